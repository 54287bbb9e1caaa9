"""Wrong turns as people take them: each ends with one message that says what to do, exit code 2 (130 for Ctrl-C), and
no traceback, before anything is computed."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

UNWRITABLE = "/sys/kernel/simmerge"  # for root, too
SEARCH = ("search", "catalogue.yaml", "--tasks", "tasks", "--budget", "2", "--evaluator", "transformers")
LABELS = ("labels", "make", "catalogue.yaml", "--tasks", "tasks", "--evaluator", "transformers")
AUTO = ("auto", "catalogue.yaml", "--probes", "probes", "--evaluator", "transformers")
TUNE = ("tune", "catalogue.yaml", "--probes", "probes")
SIGNALS = ("signals", "catalogue.yaml", "--probes", "probes")
RETENTION = ("retention", "m0", "--catalogue", "catalogue.yaml", "--probes", "probes")
EXTRACT = ("extract-lora", "m0", "--base", "base")
TRAIN = ("train", "--signals", "s.parquet", "--labels", "labels")
PLAN = ("plan", "catalogue.yaml", "--signals", "s.parquet")
PREDICTOR = ("predictor", "train", "labels")
# Catalogues with a mistake, by file: what stands in the place of what.
CATALOGUES = {
    "key typo.yaml": ("path: m1", "pth: m1"),
    "task typo.yaml": ("task: copy", "tsk: copy"),
    "gone.yaml": ("path: m1", "path: nö where/m1"),
    "twice.yaml": ("id: m1", "id: m0"),
    "base again.yaml": ("path: m1", "path: base"),
}


@pytest.fixture(scope="module")
def zoo(catalogue_path, tmp_path_factory) -> Path:
    """A catalogue and what lies about; the cases leave it as it is."""
    root = tmp_path_factory.mktemp("wrong turns ü")
    shutil.copytree(catalogue_path.parent, root, dirs_exist_ok=True)
    (root / "notes.txt").write_text("mine\n")
    (root / "not.yaml").write_text("models: [1\n")
    (root / "not.json").write_text("{")
    (root / "weights.gguf").write_bytes(b"GGUF")
    (root / "empty").mkdir()
    text = (root / "catalogue.yaml").read_text()
    for name, (old, new) in CATALOGUES.items():
        (root / name).write_text(text.replace(old, new))
    return root


@pytest.fixture
def unchanged(zoo) -> Iterator[None]:
    before = files(zoo)
    yield
    assert files(zoo) == before


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.name != "simmerge.log")


def check_refusal(result: CompletedProcess[str], message: str, code: int = 2) -> None:
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in said
    assert message in re.sub(r"[│\s]+", " ", result.stderr), said
    assert len(re.findall(r"^error: |─ Error ─|^interrupted", result.stderr, re.MULTILINE)) == 1, said


OUTPUTS = [
    ((*SEARCH, "--out", UNWRITABLE), "--out /sys/kernel/simmerge: cannot write into /sys/kernel"),
    ((*SEARCH, "--out", "notes.txt", "--dry-run"), "--out notes.txt is a file; name a directory"),
    ((*SEARCH, "--out", "tasks", "--dry-run"), "--out tasks is also --tasks, which is read"),
    ((*SEARCH, "--out", "hf://me/labels"), "the hub is not written to directly"),
    ((*LABELS, "--out", UNWRITABLE, "--dry-run"), "cannot write into /sys/kernel"),
    ((*AUTO, "--out", UNWRITABLE), "cannot write into /sys/kernel"),
    ((*AUTO, "--out", "notes.txt"), "--out notes.txt is a file; name a directory"),
    ((*TUNE, "--out", "notes.txt/tuned"), "notes.txt, which is a file"),
    ((*SIGNALS, "--out", f"{UNWRITABLE}.parquet"), "cannot write into /sys/kernel"),
    ((*SIGNALS, "--out", "."), "--out . is a directory; name a file"),
    ((*SIGNALS, "--out", "catalogue.yaml"), "--out catalogue.yaml is also CATALOGUE, which is read"),
    ((*SIGNALS, "--out", "notes.txt"), "--out notes.txt exists and is not a table of signals; choose another file"),
    ((*SIGNALS, "--out", "s.json"), "--out and what it was made of would both be s.json"),
    ((*SIGNALS, "--out", "s.parquet", "--log", UNWRITABLE), "the log /sys/kernel/simmerge cannot be written"),
    ((*TRAIN, "--out", "."), "--out . would be replaced, and --signals (s.parquet) lies in it"),
    ((*TRAIN, "--out", "m0"), "--out m0 exists and is not a selector made by `simmerge train` (it holds config.json,"),
    ((*TRAIN, "--out", "new", "--crossval", "tasks"), "--crossval tasks is a directory; name a file"),
    ((*PREDICTOR, "--out", "tasks"), "exists and is not a predictor made by `simmerge predictor train`"),
    ((*RETENTION, "--out", "probes"), "--out probes is also --probes, which is read"),
    ((*EXTRACT, "--out", "m1"), "m1 exists and is not an adapter made by `simmerge extract-lora`"),
    (("merge", "catalogue.yaml", "m0"), "OUT m0 exists and is not a merge made by simmerge"),
    (("labels", "merge", UNWRITABLE, "tasks"), "INTO /sys/kernel/simmerge: cannot write into /sys/kernel"),
    ((*PLAN, "--out", "notes.txt"), "--out notes.txt is a file; name a directory"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("command", "message"), OUTPUTS, ids=[" ".join(command)[:70] for command, _ in OUTPUTS])
def test_outputs_are_looked_at_first(simmerge, zoo, command, message):
    check_refusal(simmerge(*command, cwd=zoo), message)


TURNS = [
    # typos
    (("mrege", "a", "b"), "No such command 'mrege'. Did you mean 'merge'?"),
    (("search", "catalogue.yaml", "--budgt", "2"), "No such option: --budgt (Possible options: --budget"),
    ((*SEARCH, "--budget", "two", "--out", "l"), "Invalid value for '--budget'"),
    ((*SEARCH, "--arm", "liner", "--out", "l"), "unknown operator 'liner' (did you mean 'linear'?)"),
    ((*TUNE, "--out", "t", "--member", "m9"), "unknown checkpoint 'm9'; known: base, m0, m1, m2"),
    (
        ("catalogue", "list", "key typo.yaml"),
        "'checkpoints.1.pth' (did you mean 'path'?); known: adapter, grams",
    ),
    (("catalogue", "list", "task typo.yaml"), "unknown key 'checkpoints.1.tsk' (did you mean 'task'?)"),
    (("catalogue", "remove", "catalogue.yaml", "m9"), "unknown checkpoint 'm9'; known: m0, m1, m2"),
    (
        ("retention", "m7", *RETENTION[2:]),
        "unknown checkpoint of the catalogue 'm7'; known: base, m0, m1, m2",
    ),
    # missing files
    (("signals", "catalogue.yml", "--out", "s.parquet"), "No such file or directory (did you mean 'catalogue.yaml'?)"),
    (
        ("signals", "a b/ü.yaml", "--out", "s.parquet"),
        "a b/ü.yaml: No such file or directory (there is no directory a b)",
    ),
    (("catalogue", "list", "gone.yaml"), "nö where/m1 is not a directory"),
    (("catalogue", "add", "gone/c.yaml", "m0", "m0"), "there is no directory gone; make it first"),
    (("catalogue", "add", "catalogue.yaml", "x", "owner/x"), "no directory here, and the hub's cache does not hold it"),
    (("merge", "nothing here.yaml", "out"), "cannot read nothing here.yaml: No such file or directory"),
    ((*AUTO[:3], "gone", "--out", "o"), "gone is no directory"),
    (("extract-lora", "m0", "--base", "./gone", "--out", "l"), "gone is not a directory (and './gone' is no hub id"),
    (("cluster", "check", "gone.yaml"), "1 problem in 1 file"),
    # the wrong order of commands
    ((*TRAIN, "--out", "new"), "no signal table at s.parquet; `simmerge signals` makes one"),
    ((*PREDICTOR, "--out", "new"), "no candidate signals in labels"),
    ((*PLAN,), "s.parquet; `simmerge signals` makes one"),
    (("labels", "show", "labels"), "no label files in labels; `simmerge labels make ... --out labels` makes them"),
    (("report", "empty"), "empty holds neither signals nor labels; run `simmerge demo` or the stages first"),
    (("serve", "empty"), "empty is no finished run (`simmerge demo` makes one)"),
    ((*SEARCH[:2], "--budget", "2", "--out", "l"), "no tasks: name a directory with --tasks"),
    (
        (*AUTO, "--out", "o", "--evaluate", "3"),
        "--tasks (or --lm-eval) has the items and --evaluate says how many merges",
    ),
    # wrong formats
    (("merge", "not.yaml", "out"), "not.yaml: not YAML"),
    (("merge", "not.json", "out"), "a plan is JSON that `simmerge plan --out` writes, or mergekit's YAML"),
    (("merge", "catalogue.yaml", "out"), "is a catalogue, which says what may be merged, not how: `simmerge auto`"),
    ((*SIGNALS[:2], "--probes", "tasks", "--out", "s.parquet"), "are the directories of probes and tasks swapped?"),
    ((*SEARCH[:2], "--tasks", "probes", *SEARCH[4:], "--out", "l"), "are the directories of probes and tasks swapped?"),
    ((*PLAN[:3], "notes.txt"), "notes.txt is not a signal table"),
    (("labels", "check", "notes.txt"), "notes.txt is a file; a label store is the directory"),
    (("extract-lora", "weights.gguf", "--base", "base", "--out", "l"), "'weights.gguf' is a quantised GGUF file"),
    (("catalogue", "list", "m0"), "config m0: Is a directory"),
    (("catalogue", "list", "twice.yaml"), "id 'm0' is used 2 times"),
    (("catalogue", "list", "base again.yaml"), "'m1' is the base itself"),
    (("catalogue", "add", "catalogue.yaml", "m 3", "m0"), "'id': String should match pattern"),
    ((*TUNE, "--out", "t", "--member", "m0"), "tuning needs two or more different members, got m0"),
    (("zoo", UNWRITABLE), "RUN /sys/kernel/simmerge: cannot write into /sys/kernel"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("command", "message"), TURNS, ids=[" ".join(command)[:70] for command, _ in TURNS])
def test_a_wrong_turn_is_one_message_that_says_what_to_do(simmerge, zoo, command, message):
    check_refusal(simmerge(*command, cwd=zoo), message)


@pytest.mark.parametrize("how", [(), ("--no-ray",)], ids=["ray", "no-ray"])
def test_a_port_of_another_is_refused_with_who_has_it(simmerge, zoo, how):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check_refusal(simmerge("serve", "--port", port, *how, cwd=zoo), f"port {port} is taken by ")


# What each command calls while it works, and where Ctrl-C comes.
WORK = [
    (("catalogue", "list", "catalogue.yaml"), "simmerge_ray.checkpoints.catalogue.load_catalogue"),
    ((*SIGNALS, "--out", "s.parquet"), "simmerge_ray.pipelines.stages.signals_stage"),
    ((*SEARCH, "--out", "l"), "simmerge_ray.pipelines.dataset.search_stage"),
    (("labels", "show", "empty"), "simmerge_ray.cli.labels._existing"),
    ((*LABELS, "--out", "l"), "simmerge_ray.pipelines.dataset.search_stage"),
    ((*TRAIN, "--out", "new"), "simmerge_ray.pipelines.stages.train_stage"),
    ((*PREDICTOR, "--out", "new"), "simmerge_ray.pipelines.predictor.predictor_stage"),
    (PLAN, "simmerge_ray.checkpoints.catalogue.load_catalogue"),
    ((*AUTO, "--out", "o"), "simmerge_ray.pipelines.auto.find.find_stages"),
    ((*TUNE, "--out", "t"), "simmerge_ray.pipelines.tune.tune_stage"),
    (("merge", "plan.json", "out"), "simmerge_ray.merging.request.read_request"),
    (RETENTION, "simmerge_ray.pipelines.retention.retention_stage"),
    ((*EXTRACT, "--out", "lora"), "simmerge_ray.merging.extraction.extract_lora"),
    (("report", "empty"), "simmerge_ray.reports.run.write_report"),
    (("serve", "--no-ray", "--port", "0"), "simmerge_ray.service.http.standalone.serve_alone"),
    (("client", "policy"), "simmerge_ray.service.client.Client.policy"),
    (("db", "status", "sqlite:///x.db"), "simmerge_ray.service.log.maintenance.status"),
    (("cluster", "check", "not.yaml"), "simmerge_ray.on_ray.cluster_files.check_cluster_file"),
    (("simulate", "--models", "3", "--params", "1e8"), "simmerge_ray.capacity.simulation.simulate"),
    (("demo", "empty/run"), "simmerge_ray.pipelines.demo.run_demo"),
]


@pytest.mark.parametrize(("command", "seam"), WORK, ids=[" ".join(command)[:40] for command, _ in WORK])
def test_ctrl_c_ends_every_command_with_130_and_what_to_do(simmerge, zoo, monkeypatch, tmp_path, command, seam):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seam, interrupt)
    monkeypatch.setenv("SIMMERGE_TOKEN", "a-token-of-some-length")
    said = "interrupted; nothing is half-written, and the same command goes on from what is kept"
    check_refusal(simmerge(*command, cwd=zoo), said, 130)


def test_tasks_without_probes_and_copies_are_said_before_the_work(simmerge, zoo, tmp_path, monkeypatch):
    shutil.copytree(zoo, tmp_path / "zoo")
    (tmp_path / "zoo" / "probes" / "copy.jsonl").unlink()
    shutil.rmtree(tmp_path / "zoo" / "m2")
    shutil.copytree(zoo / "base", tmp_path / "zoo" / "m2")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simmerge_ray.on_ray.signal_actors.compute_signals_on_ray", interrupt)
    said = " ".join(simmerge(*SIGNALS, "--out", "s.parquet", cwd=tmp_path / "zoo").stdout.split())
    assert "no probes of 'copy', the own task of m1: no signals and no answers on it; write copy.jsonl" in said
    assert "'m2' holds the same weights as the base, so a merge gains nothing from it: leave it out" in said
