"""What lies in the directory of a study."""

from __future__ import annotations

from simmerge_ray.research.study.layout import PROBE_VARIANTS, WRONG_DOMAIN, probe_variants


def test_fewer_probes_and_those_of_another_task(tmp_path):
    for task in ("code", "math"):
        lines = [f'{{"text": "{task} {number}"}}\n' for number in range(20)]
        (tmp_path / f"{task}.jsonl").write_text("".join(lines))
    found = probe_variants(tmp_path)
    assert set(found) == set(PROBE_VARIANTS)
    assert found["4"]["math.jsonl"].count(b"\n") == 4 and b"math 3" in found["4"]["math.jsonl"]
    assert found[WRONG_DOMAIN]["code.jsonl"] == (tmp_path / "math.jsonl").read_bytes()
    assert found[WRONG_DOMAIN]["math.jsonl"] == (tmp_path / "code.jsonl").read_bytes()
