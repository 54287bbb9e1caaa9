"""The probe set that is shipped with the package."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import simmerge_ray
from simmerge_ray.base.errors import ProbeError
from simmerge_ray.checkpoints.probes import GENERAL, general_probe_set, load_probe_set


def num_pessimistic_tokens(text: str) -> float:
    """What a poor tokenizer makes of a text: two ASCII characters a token, and every other byte is one."""
    return sum(1 / 2 if character.isascii() else len(character.encode()) for character in text)


def test_the_general_probes_are_short_distinct_and_of_four_domains():
    path = Path(simmerge_ray.__file__).parent / "checkpoints" / "general.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["domain"] for row in rows) == {"math": 12, "code": 12, "multilingual": 12, "rag": 12}
    probes = general_probe_set()
    assert probes.task == GENERAL == "general"
    assert [probe.text for probe in probes.probes] == [row["text"] for row in rows]
    assert len(set(probes.probes)) == 48
    for probe in probes.probes:
        assert probe.text == probe.text.strip() and len(probe.text) >= 40
        assert num_pessimistic_tokens(probe.text) <= 256, probe.text


def test_keys_beside_the_text_do_not_count(tmp_path):
    for name, row in (("a", {"text": "one text"}), ("b", {"text": "one text", "domain": "math"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert load_probe_set(tmp_path / "a.jsonl").digest == load_probe_set(tmp_path / "b.jsonl").digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1=", "target": "2"}, "is a task file .*swapped"),
        ({"prompt": "1+1=", "n": 3}, "line 1: a probe is a `text`, .*has a `prompt`; `simmerge init .*--field prompt`"),
        ({"question": "1+1="}, "line 1: a probe needs a non-empty string under 'text'"),
    ],
)
def test_a_line_that_is_no_probe_says_what_it_is(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ProbeError, match=message):
        load_probe_set(tmp_path / "a.jsonl")
