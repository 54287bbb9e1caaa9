"""The endpoint on a real Ray Serve, over HTTP."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import threading
import time

import httpx
import numpy as np
import pytest
from rich.console import Console

from simmerge_ray.config import ServeConfig, TrainConfig
from simmerge_ray.errors import SelectorError
from simmerge_ray.headroom import Context
from simmerge_ray.probes import load_probe_sets
from simmerge_ray.progress import Narrator
from simmerge_ray.selector.dataset import SelectionDataset, pair_features
from simmerge_ray.selector.train import train_selector
from simmerge_ray.signals.compute import compute_signals
from tests.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def artifacts(catalogue, catalogue_path, tmp_path_factory):
    """A signal table, and a selector trained on made-up utilities of its pairs."""
    root = tmp_path_factory.mktemp("serve")
    table = compute_signals(catalogue, load_probe_sets(catalogue_path.parent / "probes"))
    table.write(root / "pairs.parquet")
    keys = [key for key in table.rows if "base" not in key]
    generator = np.random.default_rng(0)
    arms = ("linear", "ties")
    contexts = tuple(Context(*key, {arm: np.ones(4) for arm in arms}, np.ones(4), np.zeros(4)) for key in keys)
    features = np.array([pair_features(table, *key) for key in keys])
    dataset = SelectionDataset(contexts, arms, table.columns, features, generator.random((len(keys), 2)))
    train_selector(dataset, TrainConfig(num_epochs=10)).write(root / "selector")
    return root


@pytest.fixture(scope="module")
def service(artifacts):
    """(base URL, what was printed) of a running service; it is stopped as Ctrl-C would stop it."""
    port, stop = free_port(), threading.Event()
    printed = Console(record=True, file=io.StringIO(), width=300)
    config = ServeConfig(selector=artifacts / "selector", signals=artifacts / "pairs.parquet", port=port)
    from simmerge_ray.distributed.serve_app import run_service

    thread = threading.Thread(target=run_service, args=(config, Narrator(printed), stop))
    thread.start()
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while thread.is_alive() and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200 and "curl" in printed.export_text(clear=False):
                break
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    yield url, printed.export_text()
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_decision_ranks_the_arms(service):
    url, _ = service
    answer = httpx.post(f"{url}/v1/decisions", json={"left": "m0", "right": "m1"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["arm"] in [one["arm"] for one in body["arms"]] and body["tasks"] == ["add", "copy"]
    assert body["reason"] and body["overrode"] == (body["arm"] != body["best_fixed"])
    assert body["distance"] >= 0 and body["limit"] > 0
    assert body["arms"][0]["utility"] >= body["arms"][1]["utility"]
    assert httpx.get(f"{url}/v1/catalogue").json()["checkpoints"] == ["m0", "m1", "m2"]


def test_the_printed_curl_line_works_as_it_is(service):
    _, printed = service
    line = next(line for line in printed.splitlines() if line.strip().startswith("curl"))
    result = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["arm"] in ("linear", "ties")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"left": "m0", "right": "m9"}, 404, "unknown checkpoint 'm9'"),
        ({"left": "m0", "right": "m0"}, 422, "two different"),
        ({"left": "m0", "right": "m1", "task": "ad"}, 404, "unknown task 'ad'"),
        ({"left": "m0"}, 422, "right"),
        ({"left": "m0", "right": "../m1"}, 422, "pattern"),
        ({"left": "m0", "right": "m1", "path": "/etc"}, 422, "Extra inputs"),
    ],
)
def test_bad_requests_are_answered_with_what_is_wrong(service, body, status, message):
    url, _ = service
    answer = httpx.post(f"{url}/v1/decisions", json=body)
    assert answer.status_code == status and message in answer.text


def test_artifacts_that_cannot_be_served_are_refused_before_ray(tmp_path):
    from simmerge_ray.distributed.serve_app import run_service

    with pytest.raises(SelectorError, match="simmerge train"):
        run_service(ServeConfig(selector=tmp_path, signals=tmp_path / "x"), Narrator.silent())
