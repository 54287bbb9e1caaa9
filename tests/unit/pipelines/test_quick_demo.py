"""`simmerge demo --quick`, with experts of a few steps; and what both demos print at their end."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial

import typer

from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import read_json, write_json
from simmerge_ray.cli.app import app
from simmerge_ray.pipelines import quick_demo
from simmerge_ray.pipelines.demo import closing_lines
from simmerge_ray.research.zoo.recipe import EXPERT_RECIPES

RECIPES = tuple(replace(recipe, num_steps=2, num_rows=4) for recipe in quick_demo.QUICK_RECIPES)
FIND = FindConfig(num_recipes=200, shortlist=2, tune="none", max_tokens=4)


def parsed(line: str) -> str:
    """Let the command line be parsed as it is printed; its command's name. It is not run."""
    words = shlex.split(line)
    assert words[0] == "simmerge"
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(command.name, words[1:], parent=context)
        if not hasattr(command, "commands"):
            return str(context.info_name)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        words = [str(command.name), *rest]


def test_the_experts_are_those_of_the_full_demo_and_need_no_extra():
    assert set(quick_demo.QUICK_RECIPES) < set(EXPERT_RECIPES) and len(quick_demo.QUICK_RECIPES) == 3
    assert all(recipe.lora_rank is None for recipe in quick_demo.QUICK_RECIPES)  # that takes peft


def test_it_ends_with_what_the_answer_keeps_and_a_second_run_trains_nothing(simmerge, tmp_path, monkeypatch):
    monkeypatch.setattr(
        quick_demo, "quick_zoo", partial(quick_demo.quick_zoo, recipes=RECIPES, num_items=4, num_probes=6)
    )
    monkeypatch.setattr(quick_demo, "quick_run", partial(quick_demo.quick_run, config=FIND))
    result = simmerge("demo", "run", "--quick", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answer = read_json(tmp_path / "run" / "auto" / "auto.json")
    assert set(answer["keeps"]) == {"math-weak on math", "code-weak on code", "rag-weak on rag"}
    assert "kept of the members' own answers" in result.stdout and f"answer: {answer['answer']}" in result.stdout
    assert (answer["answer"] == "merge") == (tmp_path / "run" / "auto" / "merged").exists()
    again = simmerge("demo", "run", "--quick", cwd=tmp_path)
    assert again.returncode == 0 and "unchanged since the last run" in again.stdout
    assert read_json(tmp_path / "run" / "auto" / "auto.json") == answer


def test_what_it_prints_at_its_end_are_commands(tmp_path):
    layout = RunLayout(tmp_path)
    (tmp_path / "auto" / "merged").mkdir(parents=True)
    printed = [line.strip() for line in quick_demo.quick_lines(layout) if line.startswith("  ")]
    assert [parsed(line) for line in printed] == ["retention", "auto", "init"]


def test_what_the_full_demo_prints_at_its_end_are_commands(tmp_path):
    """No curl line: it would lack the token, which `serve` makes; `serve` prints one that works."""
    layout = RunLayout(tmp_path)
    write_json(layout.pick / "pick.json", {"pair": ["a", "b"], "answer": {"label": "a"}})
    printed = [line.strip() for line in closing_lines(layout) if line.startswith("  ")]
    assert [parsed(line) for line in printed] == ["auto", "serve"] and "curl -s" not in json.dumps(printed)
