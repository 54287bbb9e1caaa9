"""Recipes by what they keep of their members: the numbers of the scorer, who may ask, and what is refused with what
remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import InputError, PlanError, StoreError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.plans.recipe import GroupWeights, recipe_of
from simmerge_ray.selector.finding.aim import worth
from simmerge_ray.selector.finding.sources import FindSources, find_request, find_sources
from simmerge_ray.service.recipe_schemas import MAX_RECIPES, RecipesRequest
from simmerge_ray.service.retention import RetentionRanker
from simmerge_ray.service.schemas import PlansRequest, Refused
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureStore
from simmerge_ray.signals.table import read_signal_table
from tests.unit.service.answering import SPEC, AnsweringFiles, write_answering
from tests.unit.service.asking import Service
from tests.unit.service.published import write_published

PAIR = ("m0", "m1")
RECIPES = [
    recipe_of(make_arm("task_arithmetic"), {"m0": 0.8, "m1": 0.6}),
    recipe_of(make_arm("linear"), {"m1": 0.25, "m0": 0.75}),
    recipe_of(make_arm("ties", {"density": 0.3, "scale": 1.2}), {"m0": 1.0, "m1": 0.5}),
    recipe_of(make_arm("task_arithmetic"), {"m0": (0.2, 1.0), "m1": GroupWeights((("mlp", 0.4),), 0.9)}),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> AnsweringFiles:
    return write_answering(tmp_path_factory.mktemp("answering"))


@pytest.fixture(scope="module")
def service(files, tmp_path_factory) -> Iterator[Service]:
    one = Service.on(files, tmp_path_factory.mktemp("service"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def ranker(files) -> RetentionRanker:
    return ranker_of(files)


def ranker_of(files: AnsweringFiles, **changes: Any) -> RetentionRanker:
    parts: dict[str, Any] = {
        "table": read_signal_table(files.published.signals),
        "catalogue": files.catalogue,
        "probe_sets": load_probe_sets(files.root / "probes"),
        "signatures": str(files.root / "signatures"),
    }
    return RetentionRanker(**parts | changes)


def sources_of(files: AnsweringFiles, members: tuple[str, ...], **config: Any) -> FindSources:
    """What `simmerge auto` chooses by."""
    catalogue, probe_sets = files.catalogue, load_probe_sets(files.root / "probes")
    request = find_request(catalogue, probe_sets, FindConfig(members=members, **config))
    return find_sources(request, SignatureStore(files.root / "signatures"), local_executor(catalogue), SPEC)


def rank(service: Service, recipes: list[Any], status: int = 200, **more: Any) -> Any:
    answer = service.ask("POST", "/v1/rank", "decide", json={"recipes": recipes, **more})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["detail"]


def test_scores_are_those_of_the_virtual_scorer(service, files):
    plans = [*(MergePlan(recipe=one) for one in RECIPES), MergePlan(source="m1"), MergePlan(source="base")]
    answer = rank(service, [plan.to_json() for plan in plans])
    expected = sources_of(files, PAIR).scorer.of_plans(plans)
    assert answer["owners"] == [{"checkpoint": "m0", "task": "s"}, {"checkpoint": "m1", "task": "t"}]
    assert answer["num_considered"] == len(plans) and answer["checkpoints"] == []
    for row in answer["plans"]:
        n = row["index"]
        np.testing.assert_array_equal(row["retention"], expected.retention[n])
        np.testing.assert_array_equal(row["nll"], expected.nll[n])
        np.testing.assert_array_equal(row["kl"], expected.kl[n])
        assert row["score"] == expected.scores[n] and row["id"] == plans[n].id
        assert plan_from_json(row["plan"]) == plans[n]
    assert [row["index"] for row in answer["plans"]] == expected.order.tolist()


def test_a_plan_of_one_step_is_a_recipe(service):
    step = {"steps": [{"left": "m0", "right": "m1", "operator": "linear", "weight": 0.25}]}
    same = {
        "operator": "linear",
        "members": [{"checkpoint": "m0", "weight": 0.75}, {"checkpoint": "m1", "weight": 0.25}],
    }
    one, other = rank(service, [step, same])["plans"]
    assert one["score"] == other["score"] and one["retention"] == other["retention"]


def test_the_best_recipes_are_ranked_beside_the_checkpoints(service, files):
    body = {"checkpoints": ["m1", "m0", "m2"], "ways": "2-3", "top": 6, "by": "retention"}
    answer = service.ask("POST", "/v1/plans", "decide", json=body).json()
    members = [one["checkpoint"] for one in answer["owners"]]
    assert members == ["m0", "m1", "m2"] and answer["num_considered"] >= 2000
    scores = [row["score"] for row in answer["plans"]]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    for row in [*answer["plans"], *answer["checkpoints"]]:
        of_owners = worth(np.array(row["retention"]), np.array(row["nll"]))
        assert row["score"] == pytest.approx(((of_owners[0] + of_owners[2]) / 2 + of_owners[1]) / 2)  # s, t
        again = rank(service, [row["plan"], *({"source": name} for name in members)])["plans"]
        assert next(one for one in again if one["index"] == 0)["retention"] == row["retention"]
    assert all(2 <= len(plan_from_json(row["plan"]).members) <= 3 for row in answer["plans"])
    as_it_is = {row["label"]: row["retention"] for row in answer["checkpoints"]}
    assert set(as_it_is) == {"base", "m0", "m1", "m2"}
    assert all(as_it_is[name][n] == 1.0 for n, name in enumerate(members)), "each keeps all of its own"
    average = {"operator": "linear", "members": [{"checkpoint": name, "weight": 1 / 3} for name in members]}
    assert scores[0] >= rank(service, [average])["plans"][0]["score"]
    assert service.ask("POST", "/v1/plans", "decide", json=body).json() == answer


def test_the_examples_of_the_document_work(service):
    schemas = service.ask("GET", "/openapi.json").json()["components"]["schemas"]
    asked = [("/v1/rank", one) for one in schemas["RecipesRequest"]["examples"]]
    asked += [("/v1/plans", one) for one in schemas["PlansRequest"]["examples"] if one.get("by") == "retention"]
    assert len(asked) == 2
    for path, example in asked:
        text = json.dumps(example).replace("math-strong", "m0").replace("rag-strong", "m1")
        assert service.ask("POST", path, json=json.loads(text)).json()["by"] == "retention"


def test_the_ranking_by_the_selector_stays_as_it_was(service):
    body = {"checkpoints": ["m0", "m1"], "ways": 2, "top": 2}
    answers = [service.ask("POST", "/v1/plans", "decide", json=body | more).json() for more in ({}, {"by": "selector"})]
    assert answers[0] == answers[1] and set(answers[0]) == {"plans", "num_considered", "exhaustive"}
    assert "utility" in answers[0]["plans"][0]
    assert service.ask("POST", "/v1/rank", "decide", json={"left": "m0", "right": "m1"}).json()["arms"]


def test_one_task_alone(service):
    body = {"checkpoints": ["m0", "m1"], "ways": 2, "by": "retention", "task": "t"}
    answer = service.ask("POST", "/v1/plans", "decide", json=body).json()
    for row in answer["checkpoints"]:
        assert row["score"] == pytest.approx(float(worth(row["retention"][1], row["nll"][1])))
    assert "unknown task 'math'" in service.ask("POST", "/v1/plans", json=body | {"task": "math"}).json()["detail"]


def test_the_curve_goes_from_one_checkpoint_to_the_other(ranker, files):
    curve = ranker.curve("m1", "m0", 1.0, num=5)
    assert curve.weights.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    plans = [MergePlan(source="m0"), MergePlan(source="m1")]
    ends = sources_of(files, PAIR).scorer.of_plans(plans)
    np.testing.assert_array_equal(curve.retention[[0, -1]], ends.retention[:, ::-1])  # of m1 first
    np.testing.assert_array_equal(curve.scores[[0, -1]], ends.scores)
    twice = ranker.curve("m1", "m0", 2.0, num=5)
    assert not np.array_equal(twice.retention, curve.retention)
    with pytest.raises(PlanError, match="two different"):
        ranker.curve("m1", "m1", 1.0)


@pytest.mark.parametrize(
    ("recipe", "status", "said"),
    [
        ({"operator": "linear", "members": [{"checkpoint": "nobody"}, {"checkpoint": "m0"}]}, 404, "'nobody'"),
        ({"operator": "none", "members": [{"checkpoint": "m0"}]}, 422, "recipe 1: unknown operator"),
        ({"operator": "linear", "members": [{"checkpoint": "m0"}, {"checkpoint": "m0"}]}, 422, "twice"),
        ({"operator": "linear", "members": [{"checkpoint": "m0", "weight": 11}]}, 422, "less than or equal to 10"),
        ({"operator": "linear", "members": [{"checkpoint": "m0", "weight": "1"}]}, 422, "recipes.0.members.0.weight"),
        ({"operator": "linear", "members": [{"checkpoint": "/etc/passwd"}]}, 422, "recipes.0.members.0.checkpoint"),
        ({"operator": "linear", "members": [{"checkpoint": "m0", "weight": 1.0}, {"checkpoint": "m1", "weight": -1.0}]},
         422, "sum of its weights"),
        ({"operator": "regmean", "members": [{"checkpoint": "m0"}, {"checkpoint": "m1"}]}, 422, "regmean"),
        ({"operator": "ties", "parameters": {"density": 3}, "members": [{"checkpoint": "m0"}, {"checkpoint": "m1"}]},
         422, "density"),
        ({"operator": "linear", "members": [], "path": "/tmp/x"}, 422, "body.recipes.0.path"),
        ({"steps": [{"left": "m0", "right": "m1", "operator": "linear"}] * 2}, 422, "at most 1 item"),
        ({"source": "base"}, 422, "beside the base"),
        ([], 422, "body.recipes.0"),
        (float("nan"), 422, ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(service, recipe, status, said):
    content = json.dumps({"recipes": [recipe]})
    answer = service.ask("POST", "/v1/rank", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and said in answer.json()["detail"], answer.text


def test_requests_are_bounded(service):
    small = {"operator": "task_arithmetic", "members": [{"checkpoint": "m0", "weight": 0.123456}]}
    assert len(rank(service, [small] * MAX_RECIPES)["plans"]) == MAX_RECIPES
    assert "at most 1000 items" in rank(service, [small] * (MAX_RECIPES + 1), 422)
    run = {"operator": "ties", "members": [{"checkpoint": "m0"}, {"checkpoint": "m1"}]}
    assert "101 recipes have another operator" in rank(service, [run] * 101 + [small], 422)
    assert "more than 524288 bytes" in rank(service, [small] * 8000, 413)
    many = {"operator": "linear", "members": [{"checkpoint": f"c{n}"} for n in range(17)]}
    assert "at most 16 items" in rank(service, [many], 422)
    long = {"checkpoints": ["m0", "m1"], "by": "retention", "ways": "3-2"}
    assert "ways 3-2" in service.ask("POST", "/v1/plans", json=long).json()["detail"]
    more = service.ask("POST", "/v1/plans", json={"checkpoints": [f"c{n}" for n in range(17)], "by": "retention"})
    assert more.status_code == 404 and "unknown checkpoint" in more.text
    assert service.ask("POST", "/v1/plans", json=long | {"by": "luck"}).status_code == 422


@pytest.mark.parametrize("path", ["/v1/plans", "/v1/rank"])
def test_who_may_not_decide_may_not_ask(service, path):
    body = {"recipes": [{"source": "m0"}]} if path == "/v1/rank" else {"by": "retention"}
    assert service.ask("POST", path, "reward", json=body).status_code == 403
    assert service.ask("POST", path, "decide", json=body).status_code == 200


NUMBERS = st.sampled_from([0.0, 0.3, 1.0, -1.0, 10.0, -10.0, 1e-9])


@settings(suppress_health_check=list(HealthCheck), max_examples=40)
@given(st.sampled_from(sorted(OPERATOR_SPECS)), NUMBERS, NUMBERS, st.booleans())
def test_every_operator_is_scored_or_refused(ranker, operator, first, second, grouped):
    weight = {"groups": [["mlp", first], ["self_attn", second]]} if grouped else second
    members = [{"checkpoint": "m0", "weight": first}, {"checkpoint": "m1", "weight": weight}]
    try:
        answer = ranker.scored(RecipesRequest.model_validate({"recipes": [{"operator": operator, "members": members}]}))
    except InputError:
        return
    values = np.array([answer.plans[0].score, *answer.plans[0].retention, *answer.plans[0].nll, *answer.plans[0].kl])
    assert np.isfinite(values).all() and 0 <= values[0] <= 1


def refusal(ask) -> Refused:
    with pytest.raises(Refused) as caught:
        ask()
    assert caught.value.status == 409
    return caught.value


def ask_best(ranker: RetentionRanker, *names: str):
    return lambda: ranker.best(PlansRequest(checkpoints=list(names or PAIR), ways=2, by="retention"))


def test_a_store_from_before_the_answers_says_the_remedy(files, tmp_path):
    store = tmp_path / "signatures"
    store.mkdir()
    for path in (files.root / "signatures").glob("*.safetensors"):
        if not path.name.startswith(("answers", "written", "kept")):
            shutil.copy(path, store)
    ranker = ranker_of(files, signatures=str(store))
    detail = refusal(ask_best(ranker)).detail
    assert "no answers of m0, m1" in detail and "simmerge signals" in detail
    # Nothing is remembered of that: once they are there, it answers.
    for path in (files.root / "signatures").glob("*.safetensors"):
        shutil.copy(path, store)
    assert ask_best(ranker)().plans


def test_without_samples_of_weights_the_remedy_is_said(files, tmp_path):
    shutil.copytree(files.root / "signatures", tmp_path / "signatures")
    for path in (tmp_path / "signatures").glob("weights-*"):
        path.unlink()
    detail = refusal(ask_best(ranker_of(files, signatures=str(tmp_path / "signatures")))).detail
    assert "samples of weights of base, m0, m1" in detail


@pytest.mark.parametrize("missing", ["catalogue", "probe_sets", "signatures"])
def test_a_service_that_lacks_something_says_how_to_start_it(files, missing):
    assert "--probes" in refusal(ask_best(ranker_of(files, **{missing: None}))).detail


def test_other_probes_have_no_answers_and_other_checkpoints_no_signals(files):
    probe_sets = {name: replace(one, probes=one.probes[::-1]) for name, one in ranker_probes(files).items()}
    assert "with the same probes" in refusal(ask_best(ranker_of(files, probe_sets=probe_sets))).detail
    table = read_signal_table(files.published.signals)
    digests = {name: one for name, one in table.provenance["checkpoints"].items() if name != "m1"}
    other = replace(table, provenance=table.provenance | {"checkpoints": digests})
    assert "does not have checkpoint 'm1'" in refusal(ask_best(ranker_of(files, table=other))).detail


def ranker_probes(files: AnsweringFiles) -> Any:
    return load_probe_sets(files.root / "probes")


def test_a_checkpoint_without_probes_of_its_task_is_left_out_of_all_and_refused_by_name(files):
    probe_sets = {name: one for name, one in ranker_probes(files).items() if name == "s"}
    ranker = ranker_of(files, probe_sets=probe_sets)
    assert ranker.checkpoints == ("m0", "m2")
    with pytest.raises(InputError, match="m1"):
        ask_best(ranker)()
    assert [one.checkpoint for one in ranker.best(PlansRequest(by="retention")).owners] == ["m0", "m2"]


def test_a_store_that_is_away_is_503(files, monkeypatch):
    def away(*_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(SignatureStore, "has", away)
    with pytest.raises(StoreError, match="no route to host"):
        ask_best(ranker_of(files))()


def test_a_service_without_a_catalogue_answers_409(tmp_path_factory):
    service = Service.on(write_published(tmp_path_factory.mktemp("published")), tmp_path_factory.mktemp("service"))
    answer = service.ask("POST", "/v1/plans", json={"checkpoints": ["s1-c00", "s1-c01"], "by": "retention"})
    assert answer.status_code == 409 and "--catalogue" in answer.json()["detail"]
    assert service.ask("POST", "/v1/rank", json={"recipes": [{"source": "s1-c00"}]}).status_code == 409
    service.close()
