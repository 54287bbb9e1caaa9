"""Requests and answers of the HTTP API, version 1. Ids only, never paths. Nothing but pydantic is imported here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

CheckpointId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.\-]+$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=1000, strip_whitespace=True, pattern=r"\S")]
Utility = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]
ArmLabel = Annotated[str, Field(min_length=1, max_length=200)]
DecisionStatus = Literal["open", "rewarded", "closed", "expired"]
MAX_MEMBERS = 100


_UTILITY: TypeAdapter[float] = TypeAdapter(Utility)


def check_utility(value: object) -> None:
    """Raises ValueError for anything but a number in [0, 1]."""
    try:
        _UTILITY.validate_python(value)
    except ValidationError:
        raise ValueError(f"the utility is {value!r}; it must be a number in [0, 1]") from None


class RequestModel(BaseModel):
    """A body: closed, and not changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Refused(Exception):
    """A request that is answered with a status of its own. detail: one sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def examples(*shown: dict[str, Any]) -> ConfigDict:
    """For the OpenAPI document; with names of the demo."""
    return ConfigDict(json_schema_extra={"examples": list(shown)})


class DecisionRequest(RequestModel):
    """Which merge should be made: which operator for `left` and `right`, or which plan over some of `checkpoints`?"""

    model_config = examples(
        {"left": "math-strong", "right": "rag-strong"},
        {"left": "math-strong", "right": "rag-strong", "task": "math", "explore": False, "ttl_seconds": 86400},
        {"checkpoints": ["math-strong", "rag-strong", "code-strong"], "ways": "2-3"},
    )
    left: CheckpointId | None = None
    right: CheckpointId | None = None
    checkpoints: Annotated[list[CheckpointId], Field(min_length=2, max_length=MAX_MEMBERS)] | None = None
    task: CheckpointId | None = Field(
        None, description="choose for this task alone; default: all members' own tasks together"
    )
    ways: Annotated[str, Field(max_length=20)] | Annotated[int, Field(ge=2, le=8)] = Field(
        "2-4", description="how many of `checkpoints` a plan merges"
    )
    explore: bool = Field(True, description="false: the arm of the highest mean, left out of off-policy estimates")
    ttl_seconds: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = Field(
        None, description="after so long a first reward is refused; default: the service's"
    )

    @model_validator(mode="after")
    def _one_form(self) -> DecisionRequest:
        pair = self.left is not None and self.right is not None
        if pair == (self.checkpoints is not None) or (self.left is None) != (self.right is None):
            raise ValueError("give either left and right, or checkpoints")
        return self


class RankRequest(RequestModel):
    """All arms for a pair, without a decision."""

    model_config = examples({"left": "math-strong", "right": "rag-strong"})
    left: CheckpointId
    right: CheckpointId
    task: CheckpointId | None = None


class PlansRequest(RequestModel):
    """The best plans over checkpoints, without a decision. checkpoints: None takes the whole catalogue."""

    model_config = examples(
        {"checkpoints": ["math-strong", "rag-strong"], "ways": 2, "top": 3},
        {"checkpoints": ["math-strong", "rag-strong"], "ways": 2, "top": 3, "by": "retention"},
    )
    by: Literal["selector", "retention"] = Field(
        "selector", description="the selector's utility, or what a recipe keeps of its members' own answers"
    )
    checkpoints: Annotated[list[CheckpointId], Field(min_length=2, max_length=MAX_MEMBERS)] | None = None
    task: CheckpointId | None = None
    ways: Annotated[str, Field(max_length=20)] | Annotated[int, Field(ge=2, le=8)] = "2-4"
    top: int = Field(10, ge=1, le=100)


class RewardRequest(RequestModel):
    """The measured utility of what was decided."""

    model_config = examples({"utility": 0.711})
    utility: Utility


class ReasonRequest(RequestModel):
    """Why a reward is voided, or a decision closed."""

    model_config = examples({"reason": "infeasible: the tokenizers differ"})
    reason: Reason


class ArmRequest(RequestModel):
    """A new operator, or `keep` for both parents as they are.

    sibling: a known arm that it is expected to be like, which counts `power` of what it has seen."""

    model_config = examples({"arm": "ties(density=0.2)", "sibling": "ties", "power": 0.3})
    arm: ArmLabel
    sibling: ArmLabel | None = None
    power: float = Field(0.3, gt=0.0, le=1.0, allow_inf_nan=False)


class DiscountRequest(RequestModel):
    """What was observed so far counts `factor` of what it did."""

    model_config = examples({"factor": 0.5, "reason": "the tasks were replaced"})
    factor: float = Field(gt=0.0, le=1.0, allow_inf_nan=False)
    reason: Reason


class Influence(BaseModel):
    """A group of signals and how far it moves a prediction."""

    signal: str
    effect: float


class ArmPrediction(BaseModel):
    """One arm for a pair.

    utility, sd: what the selector predicts, averaged over the tasks, and the spread of its ensemble; null for an arm it
    was not trained on. interval: what 95 % of the merges of unseen checkpoints measured within. expected, expected_sd:
    of the utility, from all rewards so far. propensity: with which it was played.
    """

    arm: str
    utility: float | None = None
    sd: float | None = None
    interval: tuple[float, float] | None = None
    expected: float | None = None
    expected_sd: float | None = None
    propensity: float | None = None


class PlanPrediction(BaseModel):
    """A plan over several checkpoints. plan: as `simmerge merge` reads it. utility, sd, interval: null for checkpoints
    unlike those that the selector was trained on."""

    id: str
    label: str
    utility: float | None = None
    sd: float | None = None
    interval: tuple[float, float] | None = None
    propensity: float | None = None
    why: list[Influence] = []
    plan: dict[str, Any] | None = None


class Ranked(BaseModel):
    """Arms for a pair from best to worst, and the arm that the selector's safe policy takes without any reward.

    distance: of the pair to the training data; beyond `limit` the selector was not trained for such checkpoints.
    overrode: the arm is another than the best fixed one.
    """

    left: str
    right: str
    tasks: list[str]
    arm: str
    reason: str
    overrode: bool
    distance: float
    limit: float
    arms: list[ArmPrediction]
    best_fixed: str
    model_version: str
    why: list[Influence] = []


class Decision(BaseModel):
    """What to merge, and everything that was known. kind `pair`: `arm` for left and right; `plan`: `plan`. The arm
    `keep(ID)` is that checkpoint as it is, without any merge; `plan` says so as well.

    propensities: probability of each arm (or plan id) under the policy. overrode: another than the best fixed arm.
    seq_seen: the last event of the log that the decision knew.
    """

    decision_id: str
    kind: Literal["pair", "plan"]
    left: str | None = None
    right: str | None = None
    tasks: list[str]
    arm: str
    plan: PlanPrediction | None = None
    explored: bool
    reason: str
    overrode: bool
    propensities: dict[str, float]
    arms: list[ArmPrediction] = []
    plans: list[PlanPrediction] | None = None
    best_fixed: str
    distance: float | None = None
    limit: float | None = None
    epoch: int
    seq_seen: int
    expires_at: float | None = None
    model_version: str


class RewardAnswer(BaseModel):
    """The event that holds a reward, a void or a close. at: seconds since 1970."""

    decision_id: str
    seq: int
    at: float
    status: Literal["created", "replayed"]
    utility: float | None = None
    reason: str | None = None


class EventSummary(BaseModel):
    """One event of the log."""

    seq: int
    at: float
    kind: str
    status: Literal["created", "replayed"] | None = None


class DecisionRecord(BaseModel):
    """A decision and what became of it."""

    decision: Decision
    status: DecisionStatus
    utility: float | None = None
    closed_reason: str | None = None
    events: list[EventSummary]


class DecisionRow(BaseModel):
    """A decision in a list."""

    decision_id: str
    seq: int
    at: float
    kind: Literal["pair", "plan"]
    left: str | None = None
    right: str | None = None
    tasks: list[str]
    arm: str
    explored: bool
    status: DecisionStatus
    utility: float | None = None


class DecisionList(BaseModel):
    """Newest first. next_before: what to ask with for the ones before; null at the end."""

    decisions: list[DecisionRow]
    next_before: int | None = None


class SafePolicy(BaseModel):
    """An arm is left only for a draw above its own by the threshold; null: never."""

    fixed: str
    threshold: float | None


class ArmState(BaseModel):
    """What is known of an arm. mean, sd: of its reward over the level, at the mean context of the decisions so far."""

    arm: str
    count: int
    weight: float
    mean: float | None
    sd: float | None
    entropy: float


class RegretEstimate(BaseModel):
    """Rewards of drawn decisions beside an estimate of what the best fixed arm would have had (doubly robust)."""

    num: int
    mean_reward: float
    mean_best_fixed: float
    gain: float
    interval: tuple[float, float] | None


class AlarmState(BaseModel):
    """Slope of cumulative regret against the best fixed arm in a log-log plot; linear: it does not flatten."""

    linear: bool
    slope: float
    low: float
    high: float


class PolicyAnswer(BaseModel):
    """The policy as of event `seq`."""

    namespace: str
    epoch: int
    seq: int
    model_version: str
    noise_sd: float | None
    num_decisions: int
    num_rewards: int
    num_closed: int
    num_open: int
    safe: SafePolicy | None
    floor: float
    arms: list[ArmState]
    regret: RegretEstimate | None
    alarm: AlarmState | None


class CurveAnswer(BaseModel):
    """Cumulative reward, and the estimate for the best fixed arm, after each rewarded decision; thinned out."""

    seq: list[int]
    reward: list[float]
    best_fixed: list[float]
    num: int


class CatalogueCheckpoint(BaseModel):
    """A checkpoint that may be named. task: what it was fine-tuned for, where that is known."""

    id: str
    task: str | None = None


class ExamplePair(BaseModel):
    """A pair that the selector was trained on."""

    left: str
    right: str


class CatalogueAnswer(BaseModel):
    """What may be asked for."""

    checkpoints: list[CatalogueCheckpoint]
    tasks: list[str]
    arms: list[str]
    signals: list[str]
    example: ExamplePair | None = None


class SignalMatrix(BaseModel):
    """values: a signal of (row, column), null on the diagonal. checkpoints: those of the rows and of the columns.
    num_matching: how many could be asked for."""

    signal: str
    task: str
    checkpoints: list[str]
    values: list[list[float | None]]
    num_matching: int


class PlansAnswer(BaseModel):
    """Plans from best to worst. num_considered: how many were scored; exhaustive: whether that is all there are."""

    plans: list[PlanPrediction]
    num_considered: int
    exhaustive: bool
