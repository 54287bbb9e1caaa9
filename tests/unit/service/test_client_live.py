"""The client and the real service: every call, and answers that get lost on the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from simmerge_ray.base.errors import RefusedError, UnavailableError
from simmerge_ray.service.client import Client
from tests.fuzz.live import TOKENS, LiveService, live_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with live_service(tmp_path_factory.mktemp("live")) as one:
        yield one


@pytest.fixture
def client(service: LiveService) -> Iterator[Client]:
    with Client(service.url, TOKENS["admin"]) as one:
        yield one


class LosesAnswers:
    """A way to the service on which the first answers get lost after the service has given them."""

    def __init__(self, port: int, num_lost: int) -> None:
        self._target, self._left, self.passed = port, num_lost, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with near, socket.create_connection(("127.0.0.1", self._target)) as far:
                head, body = b"", b""
                while b"\r\n\r\n" not in head:
                    head += near.recv(65536)
                head, body = head.split(b"\r\n\r\n", 1)
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                while len(body) < size:
                    body += near.recv(65536)
                far.sendall(head.replace(b"HTTP/1.1", b"HTTP/1.1\r\nConnection: close", 1) + b"\r\n\r\n" + body)
                answer = b""
                while piece := far.recv(65536):
                    answer += piece
                self.passed += 1
                if self._left > 0:
                    self._left -= 1
                    continue
                near.sendall(answer)

    def close(self) -> None:
        self._listening.close()


def count(client: Client) -> int:
    return client.policy().num_decisions


def test_every_call_is_understood(client, service):
    left, right, third = service.checkpoints[:3]
    catalogue = client.catalogue()
    assert [one.id for one in catalogue.checkpoints] == list(service.checkpoints) and catalogue.arms == [
        "linear",
        "ties",
    ]
    ranked = client.rank(left, right)
    assert {one.arm for one in ranked.arms} == {"linear", "ties"} and ranked.arm in catalogue.arms
    decision = client.decide(left, right, task=catalogue.tasks[0], ttl_seconds=60)
    assert decision.tasks == catalogue.tasks[:1] and sum(decision.propensities.values()) == pytest.approx(1)
    answer = client.reward(decision.decision_id, 0.5)
    assert (answer.status, answer.utility) == ("created", 0.5)
    assert client.reward(decision.decision_id, 0.5).status == "replayed"
    assert client.void(decision.decision_id, "wrong").reason == "wrong"
    assert client.close(decision.decision_id, "infeasible: no memory").status == "created"
    record = client.get(decision.decision_id)
    assert record.status == "closed" and record.closed_reason == "infeasible: no memory"
    assert [one.kind for one in record.events] == ["decision", "reward", "reward_voided", "decision_closed"]
    plan = client.decide_plan([left, right, third], ways=3, explore=False)
    assert plan.kind == "plan" and plan.plan is not None and not plan.explored
    plans = client.plans(ways="2-3", top=4)
    assert len(plans.plans) == 4 and plans.exhaustive
    listed = client.decisions(limit=1)
    assert listed.decisions[0].decision_id == plan.decision_id
    before = client.decisions(limit=1, before=listed.next_before)
    assert before.decisions[0].decision_id == decision.decision_id
    assert client.add_arm("slerp", sibling="linear").status == "created"
    assert "slerp" in {one.arm for one in client.policy().arms}


def test_a_decision_whose_answer_was_lost_is_made_once(client, service):
    left, right = service.checkpoints[:2]
    way = LosesAnswers(service.port, num_lost=3)
    before = count(client)
    with Client(way.url, TOKENS["decide"], sleep=lambda seconds: None) as other:
        decision = other.decide(left, right)
    assert way.passed == 4 and count(client) == before + 1
    assert client.get(decision.decision_id).decision == decision  # what was told last is what was decided first
    way.close()
    way = LosesAnswers(service.port, num_lost=2)
    with Client(way.url, TOKENS["reward"], sleep=lambda seconds: None) as other:
        assert other.reward(decision.decision_id, 0.25).status == "replayed"
    assert client.get(decision.decision_id).utility == 0.25
    way.close()


def test_a_caller_with_its_own_key_may_be_restarted_between_call_and_answer(client, service):
    left, right = service.checkpoints[:2]
    way = LosesAnswers(service.port, num_lost=1)
    with Client(way.url, TOKENS["decide"], retries=0) as dies, pytest.raises(UnavailableError):
        dies.decide(left, right, key="job-17")
    before = count(client)
    with Client(way.url, TOKENS["decide"]) as restarted:
        decision = restarted.decide(left, right, key="job-17")
    assert count(client) == before
    with Client(way.url, TOKENS["decide"]) as other, pytest.raises(RefusedError, match="another request") as caught:
        other.decide(right, left, key="job-17")
    assert caught.value.status == 409 and client.get(decision.decision_id).status == "open"
    way.close()


def test_refusals_come_in_the_service_s_words(client, service):
    left, right = service.checkpoints[:2]
    with pytest.raises(RefusedError, match="unknown checkpoint 'nobody'") as caught:
        client.decide(left, "nobody")
    assert caught.value.status == 404
    with Client(service.url, "a-wrong-token-of-nobody") as other, pytest.raises(RefusedError) as caught:
        other.policy()
    assert caught.value.status == 401
    with Client(service.url, TOKENS["reward"]) as other, pytest.raises(RefusedError, match="role decide") as caught:
        other.decide(left, right)
    assert caught.value.status == 403


def test_a_service_that_is_not_there_is_unavailable():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pauses: list[float] = []
    with Client(f"http://127.0.0.1:{port}", retries=2, sleep=pauses.append) as client, pytest.raises(UnavailableError):
        client.policy()
    assert len(pauses) == 2
