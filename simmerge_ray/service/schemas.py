"""Requests and answers of the HTTP API, version 1. Ids only, never paths."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

CheckpointId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.\-]+$")]


class DecisionRequest(BaseModel):
    """Which operator should merge these two checkpoints?"""

    model_config = ConfigDict(frozen=True, extra="forbid")
    left: CheckpointId
    right: CheckpointId
    task: CheckpointId | None = Field(
        None, description="choose for this task alone; default: both parents' own tasks together"
    )


class ArmPrediction(BaseModel):
    """Predicted utility of one arm, averaged over the tasks, and the spread of the ensemble.

    interval: what 95 % of the merges of unseen checkpoints measured within; null where the selector has no intervals.
    """

    arm: str
    utility: float
    sd: float
    interval: tuple[float, float] | None = None


class Decision(BaseModel):
    """The arm to take and why, everything that was predicted, and what would be taken without signals.

    overrode: the arm is another than the best fixed one. distance: of the pair to the training data; beyond `limit`
    the selector was not trained for such checkpoints, and the arm is the best fixed one.
    """

    decision_id: str
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


class CatalogueAnswer(BaseModel):
    """What may be asked for."""

    checkpoints: list[str]
    tasks: list[str]
    arms: list[str]
