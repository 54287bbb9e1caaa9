"""Real tasks from miniature files in the formats of the public repositories."""

from __future__ import annotations

import json

import pytest

from benchmarks.finding.real_tasks import SPLIT, infix, make_real_tasks, prompt_digest
from simmerge_ray.base.errors import InputError
from simmerge_ray.base.storage import read_json
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS, RealData

MATH = """Question,Numbers,Equation,Answer
"Tom had number0 pens , and got number1 . How many now ?",4.0 0.5,+ number0 number1,4.5
"Ann has number0 . She gives number1 away and doubles it .",9 2,* - number0 number1 2.0,14
"Ida 's number0 cats eat number1 .",3 4,* number0 number1,12
"""
COMMANDS = {
    "list all files ": "ls -a",
    "go home": "cd",  # too short
    "empty /tmp": "rm -r /tmp/*",  # a path of the machine
    "show the kernel": "uname -r",
    "count lines": "wc -l",
    "count  lines twice": "x" * 49,  # too long
}
PASSAGE = "It was late. Tom sang. (Twice) and more. He left at 9 p.m. on foot. The end."


@pytest.fixture
def sources(tmp_path):
    files = {f"SVAMP/data/mawps-asdiv-a_svamp/{part}.csv": MATH for part in ("train", "dev")}
    for kind, lines in zip(("nl", "cm"), zip(*COMMANDS.items(), strict=True), strict=True):
        files[f"nl2bash/data/bash/all.{kind}"] = "\n".join(lines) + "\n"
    for code in ("fra", "deu", "spa"):
        files[f"LASER/data/tatoeba/v1/tatoeba.{code}-eng.eng"] = "Hello.\n" + "long " * 20 + "\n"
        files[f"LASER/data/tatoeba/v1/tatoeba.{code}-eng.{code}"] = f"{code}!\nlang\n"
    questions = [{"id": f"q{n}", "question": f" why {n}? ", "answers": [{"text": str(n)}]} for n in range(4)]
    paragraphs = {"data": [{"paragraphs": [{"context": PASSAGE, "qas": questions}]}]}
    files["xquad/xquad.en.json"] = json.dumps(paragraphs)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def split_of(**prompts):
    """The first prompt of each task is an item, the second a probe."""
    split = {
        task: dict(zip(("items", "probes"), ([prompt_digest(one)] for one in of_task), strict=True))
        for task, of_task in prompts.items()
    }
    split["qa"]["sentences"] = {"q0": [[1, 0]], "q1": [[2], [0, 3]], "q2": [[4]]}
    return split


PROMPTS = {
    "math": (
        "Question: Tom had 4 pens, and got 0.5. How many now?\nEquation:",
        "Question: Ida's 3 cats eat 4.\nEquation:",
    ),
    "bash": ("Task: list all files\nCommand:", "Task: show the kernel\nCommand:"),
    "translation": ("English: Hello.\nFrench:", "English: Hello.\nSpanish:"),
    "qa": (
        "Context: Tom sang. It was late.\nQuestion: why 0?\nAnswer:",
        "Context: The end.\nQuestion: why 2?\nAnswer:",
    ),
}


def test_files_are_made_as_the_study_reads_them(sources, tmp_path):
    out = tmp_path / "out"
    make_real_tasks(sources, out, split_of(**PROMPTS))
    data = RealData(out)
    made = {task: (data.items(task), data.probes(task, 9), data._examples(task, "train")) for task in REAL_TASKS}
    for task, (item, probe) in PROMPTS.items():
        assert [one.prompt for one in made[task][0]] == [item] and made[task][1] == [probe]
    assert made["math"][0][0].target == " 4 + 0.5"
    assert made["math"][2] == [("Question: Ann has 9. She gives 2 away and doubles it.\nEquation:", " (9 - 2) * 2.0")]
    assert made["bash"][2] == [("Task: count lines\nCommand:", " wc -l")]
    assert made["translation"][2] == [("English: Hello.\nGerman:", " deu!")]
    contexts = [one.prompt.split("\n")[0] for one in made["qa"][2]]
    assert contexts == ["Context: (Twice) and more.", "Context: It was late. He left at 9 p.m. on foot."]


def test_equations_are_written_with_parentheses_where_they_nest():
    assert infix("- / + 1 2 3 * 4 5.0") == "((1 + 2) / 3) - (4 * 5.0)"


def test_a_missing_source_and_a_wrong_one_are_errors(sources, tmp_path):
    split = split_of(**PROMPTS)
    with pytest.raises(InputError, match="bash: the sources hold none of its items"):
        make_real_tasks(sources, tmp_path / "out", split | {"bash": split["math"]})
    (sources / "xquad/xquad.en.json").unlink()
    with pytest.raises(InputError, match="qa: .*xquad.en.json cannot be read"):
        make_real_tasks(sources, tmp_path / "out", split)


def test_the_split_of_the_study_names_disjoint_items_and_probes():
    split = read_json(SPLIT)
    counts = {"math": (400, 128), "bash": (400, 128), "translation": (400, 128), "qa": (200, 100)}
    for task, (num_items, num_probes) in counts.items():
        items, probes = split[task]["items"], split[task]["probes"]
        assert (len(items), len(probes)) == (num_items, num_probes) and not set(items) & set(probes)
    assert set(split["digests"]) == {f"{task}/{kind}" for task in REAL_TASKS for kind in ("train", "items", "probes")}
