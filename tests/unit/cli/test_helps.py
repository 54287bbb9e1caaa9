"""Help that answers: the first words, groups, an example for every command, typos, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from simmerge_ray.cli.app import app
from simmerge_ray.cli.helps import EXAMPLES, PANELS
from tests.unit.pipelines.test_quick_demo import parsed


def every_command(group, path=()):
    """(words, command) of every command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(every_command(typer.main.get_command(app)))


def test_without_words_it_says_the_three_things_that_one_usually_wants(simmerge):
    result = simmerge()
    assert result.returncode == 0 and len(result.stdout.splitlines()) <= 12
    for name in ("init", "auto", "merge"):
        assert f"  simmerge {name} " in result.stdout
    assert "simmerge demo --quick" in result.stdout and "simmerge --help" in result.stdout


def test_every_command_has_an_example_that_can_be_typed_and_stands_in_a_group(simmerge):
    assert set(COMMANDS) <= set(EXAMPLES)
    assert {name.split()[0] for name in COMMANDS} <= {name for names in PANELS.values() for name in names}
    for name in COMMANDS:
        assert EXAMPLES[name].startswith(f"simmerge {name}"), name
        parsed(EXAMPLES[name])
    listed = simmerge("--help").stdout
    places = [listed.index(f" {panel} ") for panel in PANELS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["auto", "labels make", "db status", "merge"])
def test_help_begins_with_the_example(simmerge, name):
    lines = [line.strip() for line in simmerge(*name.split(), "--help").stdout.splitlines() if line.strip()]
    assert lines[0].startswith("Usage:") and lines[1] == f"Example: {EXAMPLES[name]}"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["mrege"], "Did you mean 'merge'?"),
        (["labels", "mak"], "Did you mean 'make'?"),
        (["auto", "c.yaml", "--prbes", "p"], "--probes"),
    ],
)
def test_a_typo_suggests(simmerge, words, hint):
    result = simmerge(*words)
    assert result.returncode == 2 and hint in result.stderr


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        ("bash", {"COMP_WORDS": "simmerge ret", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "simmerge ret"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "simmerge ret", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_commands(shell, typed):
    code = "import sys; sys.argv[0] = 'simmerge'; from simmerge_ray.cli.app import main; main()"
    for instruction, wanted in ((f"complete_{shell}", "retention"), (f"source_{shell}", "_SIMMERGE_COMPLETE")):
        environment = os.environ | typed | {"_SIMMERGE_COMPLETE": instruction}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert wanted in result.stdout, result.stderr
