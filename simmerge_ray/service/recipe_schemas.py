"""Recipes in requests, and what is said of them: scores from signatures, nothing merged. Nothing but pydantic here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from simmerge_ray.service.schemas import CheckpointId, RankRequest, RequestModel, examples

MAX_RECIPES = 1000
MAX_COMPARED = 16  # checkpoints whose answers one request looks at
MAX_SEED = 2**31 - 1
_Number = Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False, strict=True)]
_Gradient = Annotated[list[_Number], Field(min_length=2, max_length=64)]
_Operator = Annotated[str, Field(min_length=1, max_length=100)]
_Value = (
    Annotated[bool, Field(strict=True)]
    | Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False, strict=True)]
    | Annotated[str, Field(max_length=100)]
)
_Parameters = Annotated[dict[Annotated[str, Field(max_length=100)], _Value], Field(max_length=20)]


class GroupedWeight(RequestModel):
    """A number for each group of tensors: of the first whose text the tensor's name contains, else `default`."""

    groups: Annotated[
        list[tuple[Annotated[str, Field(min_length=1, max_length=200)], _Number]], Field(min_length=1, max_length=5000)
    ]
    default: _Number = 0.0


class RecipeMember(RequestModel):
    """weight: a number, a gradient over the depth, or one for each group of tensors."""

    checkpoint: CheckpointId
    weight: _Number | _Gradient | GroupedWeight = 1.0


class RecipeBody(RequestModel):
    """One n-ary step, as `simmerge auto` writes it."""

    operator: _Operator
    parameters: _Parameters = {}
    members: Annotated[list[RecipeMember], Field(min_length=1, max_length=MAX_COMPARED)]
    seed: int = Field(0, ge=0, le=MAX_SEED)


class SourceBody(RequestModel):
    """A checkpoint as it is."""

    source: CheckpointId


class StepBody(RequestModel):
    """A two-way step."""

    left: CheckpointId
    right: CheckpointId
    operator: _Operator
    parameters: _Parameters = {}
    weight: _Number | _Gradient = 0.5


class StepsBody(RequestModel):
    """A plan of one two-way step. (Longer ones cannot be scored by what they keep.)"""

    steps: Annotated[list[StepBody], Field(min_length=1, max_length=1)]
    seed: int = Field(0, ge=0, le=MAX_SEED)
    intermediate_dtype: Literal["float32", "out"] = "float32"


def _form(value: Any) -> str:
    keys = value if isinstance(value, dict) else ()
    return "of steps" if "steps" in keys else "as it is" if "source" in keys else "recipe"


AnyPlan = Annotated[
    Annotated[RecipeBody, Tag("recipe")]
    | Annotated[SourceBody, Tag("as it is")]
    | Annotated[StepsBody, Tag("of steps")],
    Discriminator(_form),
]


class RecipesRequest(RequestModel):
    """What do these recipes keep of the answers of their members, all together?"""

    model_config = examples(
        {
            "recipes": [
                {
                    "operator": "task_arithmetic",
                    "members": [
                        {"checkpoint": "math-strong", "weight": 0.8},
                        {"checkpoint": "rag-strong", "weight": 0.6},
                    ],
                },
                {"source": "math-strong"},
            ]
        }
    )
    recipes: Annotated[list[AnyPlan], Field(min_length=1, max_length=MAX_RECIPES)]
    task: CheckpointId | None = Field(None, description="score for this task alone; default: all members' own tasks")


# What `POST /v1/rank` takes.
RankBody = Annotated[
    Annotated[RankRequest, Tag("of a pair")] | Annotated[RecipesRequest, Tag("of recipes")],
    Discriminator(lambda body: "of recipes" if isinstance(body, dict) and "recipes" in body else "of a pair"),
]
# Names of the forms, which errors have in their places.
FORMS = frozenset({"recipe", "as it is", "of steps", "of a pair", "of recipes"})


class AnswersOwner(BaseModel):
    """A checkpoint with its own answers to the probes of its task."""

    checkpoint: str
    task: str


class ScoredPlan(BaseModel):
    """What a plan keeps, told from signatures.

    score: what it is ranked by, the mean over tasks of `(retention + exp(-nll)) / 2`, in [0, 1]. retention: share of
    each owner's answers that it gives as well, in the order of `owners`. nll: of these answers, nats a token. kl: from
    the owner's to its distribution, nats a token. index: place in the request. plan: as `simmerge merge` reads it.
    """

    id: str
    label: str
    score: float
    retention: list[float]
    nll: list[float]
    kl: list[float]
    index: int | None = None
    plan: dict[str, Any]


class RetentionRanking(BaseModel):
    """Plans from best to worst by what they keep of the owners' answers. checkpoints: these as they are, and the base,
    to compare; empty for recipes that were given. num_considered: how many were scored."""

    by: Literal["retention"] = "retention"
    owners: list[AnswersOwner]
    plans: list[ScoredPlan]
    checkpoints: list[ScoredPlan] = []
    num_considered: int
