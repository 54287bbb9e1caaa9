"""`simmerge client ...` over a service that a test makes up."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import simmerge_ray.service.client
from simmerge_ray.cli.app import app, run_command
from tests.unit.service.test_client import DECISION, REWARD, Service, ok, refusal

RANKED = {
    **{name: DECISION[name] for name in ("left", "right", "tasks", "arm", "reason", "overrode", "best_fixed")},
    "distance": 0.5,
    "limit": 1.0,
    "arms": [{"arm": "ties", "utility": 0.5, "sd": 0.1, "interval": [0.25, 0.75]}],
    "model_version": "v",
}
PLAN = {"id": "p", "label": "ties: a + b + c", "utility": 0.625, "sd": 0.125, "propensity": 1.0}
ROW = {
    **{name: DECISION[name] for name in ("decision_id", "kind", "left", "right", "tasks", "arm", "explored")},
    "seq": 3,
    "at": 1.7e9,
    "status": "rewarded",
    "utility": 0.5,
}
POLICY = {
    "namespace": "default", "epoch": 1, "seq": 12, "model_version": "v", "noise_sd": 0.1, "num_decisions": 5,
    "num_rewards": 4, "num_closed": 1, "num_open": 0, "safe": {"fixed": "linear", "threshold": 0.02}, "floor": 0.01,
    "arms": [{"arm": "ties", "count": 3, "weight": 3.0, "mean": 0.125, "sd": 0.25, "entropy": 1.5}],
    "regret": {"num": 4, "mean_reward": 0.5, "mean_best_fixed": 0.25, "gain": 0.25, "interval": [0.1, 0.4]},
    "alarm": {"linear": True, "slope": 1.0, "low": 0.9, "high": 1.1},
}  # fmt: skip
RECORD = {
    "decision": DECISION,
    "status": "closed",
    "closed_reason": "infeasible: \x1b[31mred",
    "events": [{"seq": 3, "at": 1.7e9, "kind": "decision"}],
}
CATALOGUE = {
    "checkpoints": [{"id": "a", "task": "code"}, {"id": "b"}],
    "tasks": ["code"],
    "arms": ["ties"],
    "signals": [],
}
KEPT = {
    "by": "retention",
    "owners": [{"checkpoint": "a", "task": "code"}, {"checkpoint": "b", "task": "math"}],
    "plans": [
        {"id": "p", "label": "linear: 0.5 a + 0.5 b", "score": 0.75, "retention": [0.875, 0.5], "nll": [0.1, 0.2],
         "kl": [0.1, 0.2], "plan": {}}
    ],
    "num_considered": 7,
}  # fmt: skip
EVENT = {"seq": 4, "at": 1.0, "kind": "arm_added", "status": "created"}


@pytest.fixture
def run(monkeypatch):
    """Runs a command against one answer; the exit code, output and the service."""

    original = httpx.Client

    def runs(arguments: list[str], *answers: Any):
        service = Service(*answers)

        def mocked(**options: Any) -> httpx.Client:
            return original(**{**options, "transport": httpx.MockTransport(service._answer)})

        monkeypatch.setattr(simmerge_ray.service.client.httpx, "Client", mocked)
        monkeypatch.setattr(simmerge_ray.service.client.time, "sleep", service.pauses.append)
        monkeypatch.setenv("COLUMNS", "200")
        result = CliRunner().invoke(app, ["client", *arguments])
        return result, service

    return runs


@pytest.mark.parametrize(
    ("arguments", "answer", "said"),
    [
        (["decide", "a", "b"], DECISION, ["decision d1", "ties", "0.750", "drawn"]),
        (
            ["decide-plan", "a", "b", "c", "--ways", "3"],
            {**DECISION, "kind": "plan", "plan": PLAN, "plans": [PLAN], "arms": []},
            ["plan     ties: a + b + c", "0.625", "1.000"],
        ),
        (["reward", "d1", "0.5"], REWARD, ["reward 0.5 of d1: created"]),
        (["close", "d1", "not made"], {**REWARD, "reason": "not made"}, ["d1 closed: created"]),
        (["void", "d1", "wrong"], {**REWARD, "status": "replayed"}, ["reward of d1 voided: replayed"]),
        (["get", "d1"], RECORD, ["closed: infeasible: ?[31mred", "decision"]),
        (["list"], {"decisions": [ROW], "next_before": 3}, ["a + b", "rewarded", "0.500", "more: --before 3"]),
        (["policy"], POLICY, ["leaves linear for a draw above its own by 0.020", "+0.250 over best fixed", "ALARM"]),
        (["policy"], {**POLICY, "safe": {"fixed": "linear", "threshold": None}}, ["never leaves linear"]),
        (["catalogue"], CATALOGUE, ["code", "arms   ties"]),
        (
            ["plans", "a", "b", "c"],
            {"plans": [PLAN], "num_considered": 7, "exhaustive": True},
            ["ties: a + b + c", "7 plans considered (all)"],
        ),
        (["best-recipes", "a", "b"], KEPT, ["linear: 0.5 a + 0.5 b", "0.750", "kept of a", "88 %", "7 recipes scored"]),
        (["rank", "a", "b"], RANKED, ["[0.250, 0.750]", "a + b; code: ties"]),
        (["add-arm", "slerp"], EVENT, ["arm slerp: created"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 6 else "",
)
def test_tables_for_people_and_the_answer_for_scripts(run, arguments, answer, said):
    result, _ = run(arguments, ok(answer))
    assert result.exit_code == 0, result.output
    for text in said:
        assert text in result.output, result.output
    assert "\x1b[31m" not in result.output
    result, _ = run([*arguments, "--json"], ok(answer))
    told = json.loads(result.output)
    assert all(told[name] == value for name, value in answer.items() if not isinstance(value, list | dict))


def test_recipes_come_from_a_file(run, tmp_path):
    path = tmp_path / "recipes.json"
    for content, sent in (('{"source": "a"}', [{"source": "a"}]), ('[{"source": "a"}, {"source": "b"}]', None)):
        path.write_text(content)
        result, service = run(["score-recipes", str(path), "--task", "code"], ok(KEPT))
        assert result.exit_code == 0 and "88 %" in result.output, result.output
        assert service.bodies[0] == {"recipes": sent or json.loads(content), "task": "code"}
    for content in ("[1]", "{", "7"):
        path.write_text(content)
        assert code_of(run, ["score-recipes", str(path)], ok(KEPT))[0] == 2
    assert code_of(run, ["score-recipes", str(tmp_path / "none.json")], ok(KEPT))[0] == 2


def test_help_says_what_arguments_mean(run):
    result, _ = run(["plans", "--help"])
    assert "[CHECKPOINT...]" in result.output and "ids to choose from" in result.output, result.output


def test_options_reach_the_service(run, tmp_path):
    (tmp_path / "token").write_text("from-file\n")
    options = ["--url", "http://there:9", "--token-file", str(tmp_path / "token")]
    call = ["decide", "a", "b", "--task", "code", "--no-explore", "--key", "job-1"]
    result, service = run([*options, *call], ok(DECISION))
    assert result.exit_code == 0, result.output
    (request,) = service.requests
    assert str(request.url) == "http://there:9/v1/decisions" and service.keys == ["job-1"]
    assert request.headers["Authorization"] == "Bearer from-file"
    assert service.bodies[0] == {"left": "a", "right": "b", "task": "code", "explore": False, "ttl_seconds": None}


def code_of(run: Any, arguments: list[str], *answers: Any) -> tuple[int, Service]:
    """The exit code of the whole program."""
    result, service = run(arguments, *answers)
    with pytest.raises(SystemExit) as ended:

        def again() -> None:
            if result.exception is not None:
                raise result.exception

        run_command(again)
        raise SystemExit(0)
    return ended.value.code, service


def test_exit_codes(run, tmp_path, capsys):
    assert code_of(run, ["policy"], refusal(404, "no such thing"))[0] == 2
    assert code_of(run, ["reward", "d1", "7"], ok(REWARD))[0] == 2
    assert code_of(run, ["policy"], refusal(401, "a token is needed"))[0] == 2
    code, service = code_of(run, ["--retries", "2", "policy"], httpx.ConnectError("refused"))
    assert code == 1 and len(service.requests) == 3
    assert code_of(run, ["--retries", "0", "policy"], refusal(503, "the disk is full"))[0] == 1
    assert code_of(run, ["policy"], httpx.Response(500))[0] == 1
    assert code_of(run, ["policy"], ok({}))[0] == 1
    assert code_of(run, ["--token-file", str(tmp_path / "none"), "policy"], ok(POLICY))[0] == 2
    assert code_of(run, ["--url", "nowhere", "policy"], ok(POLICY))[0] == 2
    assert code_of(run, ["policy"], ok(POLICY))[0] == 0
    said = capsys.readouterr().err
    assert "error: no such thing (404)" in said and "error: the disk is full (503)" in said
