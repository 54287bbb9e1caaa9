"""`simmerge simulate`, and what docs/cluster.md shows of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmerge_ray.cli.app import app

DOCS = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text()
SIZES = (("7B", "7.6e9", ()), ("111B", "111e9", ("--head-machine", "r7i.4xlarge")))


def simulated(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("shown", re.findall(r"```text\n\$ simmerge simulate (.*?)```", DOCS, re.DOTALL))
def test_what_the_docs_show_is_what_it_says(shown):
    command, _, output = shown.partition("\n")
    assert " ".join(simulated(*shlex.split(command)).split()) == " ".join(output.split())


@pytest.mark.parametrize(("name", "params", "more"), SIZES)
def test_the_sizing_table_of_the_docs_is_computed(name, params, more):
    found = json.loads(simulated("--models", "50", "--params", params, "--nodes", "8", *more, "--json"))
    signals, engines = found["signals"], found["engines"]
    hours = {place: 0.0 for place in ("driver", "signals", "engines")}
    for phase in found["phases"]:
        hours[phase["place"]] += phase["seconds"] / 3600
    bytes_of = {phase["name"]: phase["network_bytes"] for phase in found["phases"]}
    row = [
        name,
        f"{signals['workers_per_node']} x {signals['worker_bytes'] / 1e9:.1f} GB",
        str(signals["stages"]),
        f"{engines['bytes'] / 1e9:.0f} GB on {engines['gpus']}",
        f"{(sum(bytes_of.values()) - bytes_of['labels']) / 1e12:.1f} TB",
        f"{bytes_of['labels'] / 1e12:.1f} TB",
        f"{hours['signals'] + hours['driver']:.1f}",
        f"{hours['engines']:.1f}",
        f"{found['gpu_hours']:,.0f}",
        f"${sum(found['dollars'].values()):,.0f}",
    ]
    assert "| " + " | ".join(row) + " |" in DOCS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "4", "--params", "5e6"], "embeddings of this shape alone have 2.83e+07"),
        (["--models", "4", "--params", "7e9", "--signal-machine", "r7i.4xlrge"], "did you mean 'r7i.4xlarge'"),
        (["--models", "4", "--params", "400e9"], "no machine of aws that the costs know holds an engine of 1602 GB"),
        (["--models", "4", "--params", "400e9", "--engine-machine", "p5.48xlarge"], "does not fit 8 GPUs of 80 GB"),
        (["--models", "4", "--params", "7e9", "--ways", "3"], "--merges"),
        (["--models", "4", "--params", "7e9", "--arm", "tise"], "did you mean 'ties'"),
        (["--models", "4", "--params", "7e9", "--costs", "absent.yaml"], "absent.yaml"),
        (["--models", "4", "--params", "7e9", "--config", "absent.json"], "absent.json"),
        (["--models", "1", "--params", "7e9"], "--models"),
        (["--models", "4", "--params", "inf"], "finite number"),
        (["--models", "4", "--params", "7e9", "--steps", "0"], "--steps is about a choice without labels: give --auto"),
        (["--models", "4", "--params", "7e9", "--auto", "--evaluate", "-1"], "--evaluate -1"),
    ],
)
def test_what_cannot_be_simulated_is_one_error(arguments, said, simmerge):
    result = simmerge("simulate", *arguments)
    assert result.returncode == 2 and said in result.stderr


def test_a_choice_without_labels_is_computed_as_shown():
    arguments = ["--auto", "--models", "2", "--params", "7.6e9", "--steps", "0", "--evaluate", "3", "--evaluate", "5"]
    found = json.loads(simulated(*arguments, "--json"))
    assert list(found["measured"]) == ["3", "5"] and found["tuning"]["fits"] is False
    page = simulated(*arguments)
    for row in (found["without_labels"], *found["measured"].values()):
        assert re.search(rf"{row['seconds']:,.0f} +{row['node_hours']:,.2f} +{row['dollars']:,.2f}", page)


SHAPE = {
    "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "vocab_size": 152064,
    "intermediate_size": 18944, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_a_config_gives_the_shape(tmp_path):
    arguments = ["--models", "4", "--params", "7.616e9", "--json"]
    known = json.loads(simulated(*arguments))
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    arguments += ["--config", str(tmp_path / "config.json")]
    assert json.loads(simulated(*arguments))["seconds"] == known["seconds"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SHAPE | {"torch_dtype": "float32"}}))
    twice = json.loads(simulated(*arguments))
    assert twice["phases"][0]["network_bytes"] == pytest.approx(2 * known["phases"][0]["network_bytes"])
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "text_config": None}))
    assert json.loads(simulated(*arguments))["seconds"] == known["seconds"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "num_hidden_layers"), ("[]", "holds no object"), ("{", "config.json"),
     (json.dumps(SHAPE | {"intermediate_size": [1, 2]}), "intermediate_size")],
)  # fmt: skip
def test_a_config_that_gives_none_is_one_error(tmp_path, content, said, simmerge):
    (tmp_path / "config.json").write_text(content)
    result = simmerge("simulate", "--models", "4", "--params", "7e9", "--config", tmp_path / "config.json")
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_engines_are_of_the_signals_cloud():
    for machine, prefixes in (("r7i.4xlarge", ("g6", "p4", "p5")), ("n2-highmem-16", ("g2-", "a2-", "a3-"))):
        found = json.loads(simulated("--models", "4", "--params", "1e9", "--signal-machine", machine, "--json"))
        assert found["engines"]["machine"].startswith(prefixes)


def test_prices_of_one_s_own_count(tmp_path):
    text = (Path(__file__).parents[3] / "simmerge_ray" / "capacity" / "unit_costs.yaml").read_text()
    (tmp_path / "costs.yaml").write_text(text.replace("dollars: 22,", "dollars: 44,"))
    arguments = ["--models", "4", "--params", "7.6e9", "--engine-machine", "p4d.24xlarge", "--json"]
    own = ["--costs", str(tmp_path / "costs.yaml")]
    before, after = (json.loads(simulated(*arguments, *more)) for more in ([], own))
    assert after["dollars"]["engines"] == pytest.approx(2 * before["dollars"]["engines"])
