"""The choice without labels for every pair of a run, as `simmerge auto` makes it, and what it was worth when measured.

`choices/` of a run gets `pairs/`, a file a pair (an interrupted stage goes on after the last one), `labels`, of what
was chosen, and `choices.json`, what every way of choosing is worth over all pairs that have labels. A choice reads
checkpoints and probes; the items of an evaluation are read after it, by what measures it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator, Report
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, digest_file, digest_json, read_json, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import run_tasks
from simmerge_ray.pipelines.dataset import UNCHANGED, input_digests, search_bar
from simmerge_ray.plans.keeping import arm_plan, named_arms
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore, Measured, check_comparable
from simmerge_ray.selector.data.splits import Group, Pair

AVERAGE, FIXED, SELECTOR = "plain average", "best fixed arm", "paper's selector"
CHOSEN, ANSWER = "chosen without labels", "chosen and tuned"
PARENT, BASE, ORACLE = "better parent, in hindsight", "base", "split-half oracle"
ALWAYS = "always tuned"
_SCHEMA = 1  # changes with what a choice is made by
_TUNED_SCHEMA = 2  # the same, where the best few are tuned


@dataclass(frozen=True)
class MadeChoice:
    """What was chosen for a pair or a larger set of checkpoints.

    plan: the best recipe or checkpoint. tuned: its coefficients tuned. answer: that of `simmerge auto`, one of the two.
    key: digest of what it was made from.
    """

    members: Group
    plan: MergePlan
    tuned: MergePlan | None
    answer: MergePlan
    keeps: Mapping[str, float]
    key: str = ""

    @property
    def is_tuned(self) -> bool:
        return self.tuned is not None and self.answer.id == self.tuned.id

    @property
    def label(self) -> str:
        """Short text of the answer: a tuned merge has too many coefficients for one."""
        return f"tuned: {' + '.join(self.answer.members)}" if self.is_tuned else self.answer.label

    @property
    def plans(self) -> tuple[MergePlan, ...]:
        return (self.plan, *((self.tuned,) if self.tuned else ()))


@dataclass(frozen=True)
class ChoiceTask:
    """All that the choices have in common; sent to workers. signatures: URI of their store. directory: `choices`.
    engine: what runs candidates."""

    catalogue: Catalogue
    probe_sets: Mapping[str, ProbeSet]
    find: FindConfig
    signatures: str
    directory: Path
    engine: SearchConfig = SearchConfig(evaluator="transformers", pairs="all")

    def key(self, members: Group, digests: Mapping[str, str]) -> str:
        """Digest of what the choice is made from."""
        base = self.catalogue.base
        used = {name: digests[name] for name in (*members, *((base.id,) if base else ()))}
        probes = {task: self.probe_sets[task].digest for task in self.catalogue.tasks_of(members)}
        config = [self.find.model_dump(mode="json"), self.engine.content()]
        schema = _SCHEMA if self.find.tune == "none" else _TUNED_SCHEMA
        return digest_json([schema, list(members), used, probes, config])


def choice_file(choices: Path, members: Group) -> Path:
    """Where the choice for a pair or a larger set is kept."""
    return choices / "pairs" / f"{'+'.join(members)}.json"


def read_choice(choices: Path, members: Group) -> MadeChoice:
    """The choice for a pair or a larger set that the stage has made."""
    content = read_json(choice_file(choices, members))
    tuned = [plan_from_json(row["plan"]) for row in content["tuned"]]
    plan, answer = (plan_from_json(row["plan"]) for row in (content["candidates"][0], content["best"]))
    return MadeChoice(members, plan, tuned[0] if tuned else None, answer, content["keeps"], content["key"])


def choices_stage(layout: RunLayout[Path], narrator: Narrator, search: SearchConfig, find: FindConfig) -> None:
    """Choose for all pairs of the run, the one without labels too; measure the choices for those that have labels.

    Args:
        search: made the labels; its evaluator measures the choices.

    Raises:
        InputError: what `simmerge auto` refuses. EngineError: the evaluator did not start.
    """
    with narrator.stage("choices") as stage:
        catalogue, probe_sets = load_catalogue(layout.catalogue.resolve()), load_probe_sets(layout.probes)
        config = {"find": find.model_dump(mode="json"), "search": search.content()}
        inputs = input_digests(catalogue, load_tasks(layout.tasks))
        inputs |= {f"probes {task}": one.digest for task, one in probe_sets.items()}
        inputs |= {"labels": LabelStore(layout.labels).digest(), "selector": digest_file(layout.crossval)}
        manifest = Manifest("choices", config, inputs, _SCHEMA)
        if manifest.is_current(layout.choices / "manifest.json"):
            stage.result = UNCHANGED
            return
        started = time.monotonic()
        places = (str((layout.signals.parent / "signatures").resolve()), layout.choices.resolve())
        task = ChoiceTask(catalogue, probe_sets, find, *places)
        with ray_session():
            with narrator.bar("pairs chosen for") as report:
                num_new = _choose_missing(task, report)
            choices = [read_choice(layout.choices, pair) for pair in catalogue.pairs()]
            chosen = time.monotonic() - started
            labelled = [one for one in choices if {*one.members} not in [{*pair} for pair in search.exclude]]
            _measure(layout, search, catalogue, labelled, narrator)
        content = compared_choices(layout, search, catalogue, labelled)
        write_json(layout.choices / "choices.json", content)
        manifest.write(layout.choices / "manifest.json", time.monotonic() - started, {"num_new": num_new})
        shown = {row["way"]: f"{row['utility']:.3f}" for row in content["ways"] if row["utility"] is not None}
        stage.result = (
            f"{num_new} pairs in {chosen:.0f} s, then measured {len(labelled)}: plain average {shown[AVERAGE]}, "
            f"chosen {shown[CHOSEN]}, tuned {shown[ANSWER]}, oracle {shown[ORACLE]} -> {layout.choices}"
        )


def missing_choices(task: ChoiceTask, groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """Pairs or larger sets whose file is missing or of other inputs, with the keys of what is to be there."""
    digests = task.catalogue.digests()
    keys = {group: task.key(group, digests) for group in groups}
    files = {group: choice_file(task.directory, group) for group in keys}
    return [
        (group, key)
        for group, key in keys.items()
        if not (files[group].exists() and read_json(files[group])["key"] == key)
    ]


def _choose_missing(task: ChoiceTask, report: Report) -> int:
    """Choose for what is missing, a core each; how many pairs these were."""
    pairs = task.catalogue.pairs()
    missing, total = missing_choices(task, pairs), len(pairs)
    with closing(run_tasks(_choose, deque(missing), shared=(task,))) as ended:
        for count, _ in enumerate(ended, 1):
            report(total - len(missing) + count, total)
    return len(missing)


def _choose(task: ChoiceTask, members: Group, key: str) -> None:
    """The choice for one pair, on one thread."""
    import torch

    torch.set_num_threads(1)
    choose_for(task, members, key)


def choose_for(task: ChoiceTask, members: Group, key: str) -> None:
    """Write one choice, made in this process; what it ran is forgotten, since it takes little."""
    with tempfile.TemporaryDirectory(prefix="simmerge-choice-") as scratch:
        write_json(choice_file(task.directory, members), {"key": key} | chosen_of(task, members, Path(scratch)))


def chosen_of(task: ChoiceTask, members: Group, directory: Path) -> dict[str, Any]:
    """JSON value of the choice among some members, made in this process; what it ran is kept in `directory`."""
    from simmerge_ray.on_ray.engines import start_evaluator
    from simmerge_ray.pipelines.auto.answer import label_free_json
    from simmerge_ray.pipelines.auto.find import find_here
    from simmerge_ray.pipelines.auto.request import AutoRun
    from simmerge_ray.selector.finding.sources import find_request

    request = find_request(task.catalogue, task.probe_sets, task.find.model_copy(update={"members": members}))
    run = AutoRun(request, task.engine, directory, task.signatures, {}, write=False)
    return label_free_json(run, find_here(run, start_evaluator))


def _measure(
    layout: RunLayout[Path],
    search: SearchConfig,
    catalogue: Catalogue,
    choices: Iterable[MadeChoice],
    narrator: Narrator,
) -> None:
    """Labels of the merges that were chosen, on the tasks of their pairs."""
    from simmerge_ray.on_ray.merge_search import run_search

    store = (layout.choices / "labels").resolve()
    known = [label for label in LabelStore(layout.labels).read() if label.plan.source is not None]
    LabelStore(store).append(known)  # by the same evaluator: checkpoints are not run again
    tasks_of: dict[MergePlan, set[str]] = {}
    for one in choices:
        for plan in one.plans:
            if plan.is_merge:  # a scaled checkpoint too is asked for the tasks of both
                tasks_of.setdefault(plan, set()).update(catalogue.tasks_of(one.members))
    plans = {plan: sorted(names) for plan, names in tasks_of.items()}
    config = search.model_copy(update={"exclude": ()})
    with search_bar(narrator) as report:
        run_search(catalogue, load_tasks(layout.tasks), config, store, plans, report)


def compared_choices(
    layout: RunLayout[Path], search: SearchConfig, catalogue: Catalogue, choices: Sequence[MadeChoice]
) -> dict[str, Any]:
    """What every way of choosing is worth over the pairs that have labels."""
    import numpy as np

    from simmerge_ray.research.choosing import best_elsewhere, compare_ways, taken
    from simmerge_ray.research.pair_sample import PairSample

    arms = [arm.label for arm in parse_arms(search.arms)]
    rows = _worth_by_way(layout, catalogue, choices, arms)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    of_arms = np.stack([columns.pop(arm) for arm in arms], axis=1)
    fixed = best_elsewhere(of_arms)
    columns = {AVERAGE: of_arms[:, arms.index("linear")], FIXED: taken(of_arms, fixed)} | columns
    always = columns.pop(ALWAYS)
    pairs = [one.members for one in choices]
    return {
        "ways": compare_ways(PairSample(tuple(pairs)), columns, (AVERAGE, PARENT)),
        "pairs": [
            {"pair": list(pair)} | {name: _known(values[number]) for name, values in columns.items()}
            for number, pair in enumerate(pairs)
        ],
        "num_arms": len(arms),
        "num_merges": sum(one.answer.is_merge for one in choices),
        "num_tuned": sum(one.is_tuned for one in choices),
        "always_tuned": None if np.isnan(always).all() else float(np.nanmean(always)),
        "fixed_arms": sorted({arms[column] for column in fixed.tolist() if column >= 0}),
    }


def _worth_by_way(
    layout: RunLayout[Path], catalogue: Catalogue, choices: Sequence[MadeChoice], arms: Sequence[str]
) -> list[dict[str, float]]:
    """Of each pair the utility of every arm and of what each way takes, on both parents' tasks; NaN for what was not
    measured or not said."""
    from simmerge_ray.research.choosing import split_half_oracle, utility

    labels = [*LabelStore(layout.labels).read(), *LabelStore(layout.choices / "labels").read()]
    check_comparable(labels)
    measured = {(one.plan.id, one.task): one.outcome.items for one in labels if isinstance(one.outcome, Measured)}
    base, named = catalogue.base, _selector_choices(read_json(layout.crossval))
    assert base is not None, "checked by `find_request`"
    rows = []
    for one in choices:
        tasks = catalogue.tasks_of(one.members)
        left, right = one.members
        of_arms = {arm: arm_plan(left, right, arm).id for arm in arms}
        parents, kept = [MergePlan(source=name).id for name in one.members], MergePlan(source=base.id).id
        every = dict.fromkeys([*of_arms.values(), *parents, kept, *(plan.id for plan in one.plans)])
        options = {
            name: {task: measured[name, task] for task in tasks}
            for name in every
            if all((name, task) in measured for task in tasks)
        }
        worth = dict.fromkeys([None, *every], math.nan) | {name: utility(items) for name, items in options.items()}
        rows.append(
            {arm: worth[name] for arm, name in of_arms.items()}
            | {
                SELECTOR: worth[arm_plan(left, right, arm).id if (arm := named.get(frozenset(one.members))) else None],
                CHOSEN: worth[one.plan.id],
                ANSWER: worth[one.answer.id],
                ALWAYS: worth[one.tuned.id if one.tuned else None],
                PARENT: max(worth[name] for name in parents),
                BASE: worth[kept],
                ORACLE: split_half_oracle(options),
            }
        )
    return rows


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _selector_choices(crossval: Mapping[str, Any]) -> dict[frozenset[str], str]:
    """The arm that the selector names for each pair when it was trained without a checkpoint of it, as answers call
    it: the best mean of the predictions for the parents' tasks."""
    import numpy as np

    of_pair: dict[Pair, list[list[float]]] = {}
    for row in crossval.get("predictions", ()):
        of_pair.setdefault((row["left"], row["right"]), []).append(row["predicted"])
    best = {pair: int(np.mean(predicted, axis=0).argmax()) for pair, predicted in of_pair.items()}
    return {frozenset(pair): named_arms(crossval["arms"], *pair)[place] for pair, place in best.items()}
