"""The table of all ratios: values with their targets, and what could not run with its reason."""

from __future__ import annotations

from pathlib import Path

from benchmarks.run_all import TARGETS, Part, Ratio, first_json, merge_figures, parts, report, run_part

SIDES = {"ours": {"wall_s": 1.0, "cpu_s": 2.0}, "mergekit": {"wall_s": 9.0, "cpu_s": 8.0}, "copy": {"wall_s": 0.8}}
RESULT = {key: [{"operator": "linear", "sides": SIDES}] for key in ("commands", "in_process")}
WHERE = {"cpu": "a CPU", "num_cpus": 2, "load": 0.25, "date": "2026-11-30"}


def test_ratios_of_merges_are_those_of_the_sides_and_have_their_targets():
    found = merge_figures(RESULT)
    assert found["whole command, linear: mergekit / ours, wall"] == 9.0
    assert found["whole command, linear: mergekit / ours, CPU"] == 4.0
    assert found["in process, linear: copy / ours, wall"] == 0.8
    assert {name for name in TARGETS if "linear" in name} <= set(found)


def test_a_limit_from_below_is_met_by_more_and_one_from_above_by_less():
    assert Ratio("p", "speed", 9.0, 8.0).met and not Ratio("p", "speed", 7.0, 8.0).met
    assert Ratio("p", "seconds, at most", 5.0, 6.0).met and not Ratio("p", "seconds, at most", 7.0, 6.0).met
    assert Ratio("p", "speed", 9.0).met is None and Ratio("p", "speed", None, 8.0).met is None


def test_what_cannot_run_is_a_row_with_its_reason(tmp_path):
    known = parts(tmp_path / "fixtures", tmp_path / "venv", None)
    assert "mergekit_env" in str(known["merge"]) and known["serve"] == "needs --run"
    (left_out,) = run_part("serve", known["serve"], tmp_path, 1.0)
    (failed,) = run_part("broken", Part(("no.such.script",), dict), tmp_path, 60.0)
    assert left_out.note == "needs --run" and failed.value is None and "ended with 1" in failed.note
    text = report([left_out, failed, Ratio("merge", "speed", 9.0, 8.0)], WHERE)
    assert "a CPU, 2 cores, load 0.2" in text and "| merge | speed | 9 | 8 | yes |  |" in text
    assert "| serve | left out | - |  |  | needs --run |" in text


def test_the_first_value_of_an_output_counts():
    assert first_json('{"p50_us": 1}\n{"p50_us": 2}\n') == {"p50_us": 1}


def test_every_part_names_a_script_that_is_there():
    root = Path(__file__).parents[3] / "benchmarks"
    known = parts(Path("fixtures"), Path("/"), Path("run"))
    scripts = [part.arguments[0] for part in known.values() if isinstance(part, Part)]
    assert len(scripts) >= 3 and all((root / f"{name.replace('.', '/')}.py").is_file() for name in scripts)
