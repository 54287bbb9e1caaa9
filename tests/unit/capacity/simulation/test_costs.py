"""The unit costs: each measured one stands in benchmarks/README.md; a file of one's own is checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.machines import MACHINES
from simmerge_ray.capacity.simulation import load_costs
from simmerge_ray.capacity.simulation.costs import MeasuredCosts
from simmerge_ray.plans.operators.specs import parse_arms

ROOT = Path(__file__).parents[4]
FILE = ROOT / "simmerge_ray" / "capacity" / "unit_costs.yaml"


@pytest.mark.parametrize("name", MeasuredCosts.model_fields)
def test_a_measured_cost_is_that_of_the_benchmarks(name):
    figure = getattr(load_costs().measured, name)
    told = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert " ".join(figure.text.split()) in told
    assert re.fullmatch(r"[0-9.e+\-*/() ]+", figure.arithmetic)
    assert eval(figure.arithmetic) == pytest.approx(figure.value, rel=0.03)


def test_machines_are_those_of_the_cluster_check():
    assumed = load_costs().assumed
    assert set(assumed.machines) == set(MACHINES)
    assert {machine.gpu_gb for machine in MACHINES.values() if machine.gpus} <= set(assumed.gpus)


def test_a_merge_costs_what_its_operator_does():
    costs = load_costs()
    linear, spherical, trimmed = (costs.merge_ns(arm, 2) for arm in parse_arms(["linear", "nuslerp", "ties"]))
    assert 0 < linear < spherical < trimmed
    assert costs.merge_ns(parse_arms(["linear"])[0], 4) == 2 * linear


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["measured"].pop("item_s"), "item_s"),
        (lambda content: content["measured"]["item_s"].update(value=-1), "greater than 0"),
        (lambda content: content["assumed"].update(prefil_utilisation=0.5), "prefil_utilisation"),
        (lambda content: content["assumed"].update(spot_share=1.5), "spot_share"),
    ],
)
def test_a_wrong_file_is_one_error(tmp_path, change, said):
    content = yaml.safe_load(FILE.read_text())
    change(content)
    (tmp_path / "costs.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=said):
        load_costs(tmp_path / "costs.yaml")


def test_the_file_of_the_package_is_read_as_one_s_own(tmp_path):
    (tmp_path / "costs.yaml").write_text(FILE.read_text())
    assert load_costs(tmp_path / "costs.yaml") == load_costs()
