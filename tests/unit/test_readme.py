"""README: short, its links lead somewhere, its numbers are those of the files they come from, its commands run."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from simmerge_ray.pipelines.auto import answer
from tests import tiny
from tests.unit.pipelines.test_quick_demo import parsed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
AUTO = "simmerge auto work/catalogue.yaml --probes work/probes --out work/best --evaluator transformers"
# Commands that are run elsewhere: by CI itself, or by the test that is named.
ELSEWHERE = {
    "git clone": ".ci/run",
    "make setup": ".ci/run::make setup",
    "make test": ".ci/run::make test",
    "source .venv/bin/activate": ".ci/run",
    "make demo": "tests/e2e/test_demo.py::test_the_demo_leaves_what_it_promises",
    "simmerge demo --quick": "tests/unit/pipelines/test_quick_demo.py::test_it_ends_with_what_the_answer_keeps",
    "simmerge doctor": "tests/unit/cli/test_doctor.py::test_it_says_what_is_there_in_words",
    f"{AUTO} --tasks": "tests/on_ray/test_auto.py::test_a_whole_run_tunes_and_measures",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> Iterator[str]:
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = " ".join(re.sub(r"\s#.*", "", line).split())
            yield from (word.strip() for word in words.split("&&") if not word.strip().startswith("cd "))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\(.*?\)|\[", "", title).lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in kept}


def test_it_is_short():
    assert README.count("\n") <= 150
    assert max(map(len, README.splitlines())) <= 240  # a row of a table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {target}"


def numbers_with_sources() -> list[tuple[str, str]]:
    """(the text before a `numbers:` comment, from its heading or the last comment on; the file)."""
    pieces = re.split(r"<!-- numbers: (\S+) -->", re.sub(r"arXiv:\S+", "", README))
    texts = (re.split(r"\n#+ .*\n|-->", text)[-1] for text in pieces[::2])
    return list(zip(texts, pieces[1::2], strict=False))


def known_numbers(source: Path) -> set[str]:
    if source.suffix != ".json":
        return set(re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", source.read_text()))
    known: set[str] = set()
    content = json.loads(source.read_text())
    for row in (*content["candidates"], *content["tuned"]):
        known |= {f"{row['score']:.3f}", *(f"{100 * share:.0f}" for share in row["retention"].values())}
        known |= set(re.findall(r"\d+\.\d+", row["label"]))
        if of_task := row.get("measured"):  # one set of members, one number
            known.add(f"{sum(of_task.values()) / len(of_task):.3f}")
    return known


def test_numbers_are_those_of_their_files():
    found = numbers_with_sources()
    assert len(found) >= 4
    for text, source in found:
        known = known_numbers(ROOT / source)
        bare = {number.lstrip("+-") for number in known}
        told = re.findall(r"(?<![\w.])([+-]?\d+\.\d+|[+-]?\d+(?= %)|(?<=\| )\d+(?= \|))", text)
        assert told, source
        for number in told:
            assert number in (known if number[0] in "+-" else bare), f"{number} is not in {source}"


def test_every_command_is_run_here_or_by_the_test_that_is_named():
    found = list(commands())
    assert len(found) > 10
    for command in found:
        if command.startswith("simmerge"):
            parsed(command)
        if (where := next((at for start, at in ELSEWHERE.items() if command.startswith(start)), None)) is None:
            assert command.split()[1] in ("init", "auto", "retention", "merge"), command  # see below
            continue
        file, _, name = where.partition("::")
        assert name in (ROOT / file).read_text(), where
    assert "make test" in found  # the command that CI and readers look for


def test_from_a_clone_to_a_merge_with_a_verdict_takes_at_most_eight_commands():
    """No file is written by hand: `init` writes what `auto` reads."""
    found = list(commands())
    until = [one for one in found[: found.index(AUTO) + 1] if one not in ("simmerge doctor", "simmerge demo --quick")]
    assert 1 + len(until) <= 8  # `cd` is one
    assert [one.split()[0] for one in until] == ["git", "make", "source", "simmerge", "simmerge"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where README's commands find `/models`, the files of prompts, and a mergekit file; no Ray is started."""
    tiny.make_catalogue(tmp_path / "models", num_checkpoints=2)
    for name, title in (("m0", "math"), ("m1", "code")):
        (tmp_path / "models" / name).rename(tmp_path / "models" / title)
    prompts = [f"{number}+{number}=" for number in range(16)]
    with (tmp_path / "math.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt",), *((prompt,) for prompt in prompts[:8])])
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[8:]))
    models = [{"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("math", "code")]
    (tmp_path / "merge.yml").write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    asked = answer.auto_run
    monkeypatch.setattr(answer, "auto_run", lambda *given, **options: replace(asked(*given, **options), here=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_commands_run_in_their_order(place, simmerge):
    """From checkpoints of one's own to a merge with a verdict, then mergekit's YAML, and Python."""
    run = [one for one in commands() if one.startswith("simmerge") and not any(map(one.startswith, ELSEWHERE))]
    assert [one.split()[1] for one in run] == ["init", "auto", "retention", "merge", "merge"]
    for command in run:
        merged = place / "work" / "best" / "merged"
        if command.startswith("simmerge retention") and not merged.exists():
            shutil.copytree(place / "models" / "math", merged)  # where the answer was to keep a checkpoint
        result = simmerge(*shlex.split(command.replace("/models/", f"{place}/models/"))[1:])
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        if command.startswith("simmerge auto"):
            assert "answer: " in result.stdout and "math on math" in result.stdout
    assert (place / "merged" / "model.safetensors").exists()
    names: dict[str, object] = {}
    (snippet,) = blocks("python")
    assert snippet.endswith('best.write("merged")\n')
    exec(snippet.replace('best.write("merged")', ""), names)
    assert set(names["best"].retention) == {"math on math", "code on code"}


def told_commands(page: Path) -> Iterator[str]:
    """`simmerge` command lines in the code of a page, without what only a shell understands."""
    for block in re.findall(r"```(?:bash|console)?\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s+#.*|^\$ ", "", line.strip())
            words = re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?simmerge ", "simmerge ", words)
            if words.startswith("simmerge ") and "..." not in words:
                yield from (one.strip() for one in words.split(" && "))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "cluster" / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_pages_can_be_typed(page, monkeypatch):
    """Their names, options and values are those of the program."""
    monkeypatch.setenv("SIMMERGE_DATABASE", "sqlite:///service.db")  # as docs/event-log.md says
    for command in told_commands(page):
        try:
            parsed(command)
        except Exception as error:
            pytest.fail(f"{page.name}: {command}: {error}")
