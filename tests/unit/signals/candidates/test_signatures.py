"""Answers in signatures: the numbers of a direct computation, to the bit whoever runs the units and after any stop."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import CheckpointError, ConfigError, ProbeError
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import end_of_text
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.signals.candidates.answers import (
    AnswerSpec,
    answer_logits,
    chosen_tokens,
    join_answers,
    kept_log_probabilities,
    kept_tokens,
    write_answers,
)
from simmerge_ray.signals.candidates.signatures import (
    Owner,
    answers_of_merge,
    check_owners,
    collect_answers,
    owners_of,
)
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.queue import Unit
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.worker import SignalWorker
from tests import tiny
from tests.unit.signals.executors import counted

SPEC = AnswerSpec(max_tokens=4, num_kept=10)
SIGNATURE = SignatureSpec(batch_size=8)
BATCHES = 3  # of 24 probes


@pytest.fixture(scope="module")
def probe_sets(catalogue_path):
    found = load_probe_sets(catalogue_path.parent / "probes")
    return found | {GENERAL: ProbeSet(GENERAL, found["copy"].probes[:10])}


def collected(catalogue, probe_sets, store, executor=None):
    return collect_answers(catalogue, probe_sets, store, executor or local_executor(catalogue), SPEC, SIGNATURE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SignatureStore(tmp_path_factory.mktemp("signatures"))


@pytest.fixture(scope="module")
def answers(catalogue, probe_sets, store):
    return collected(catalogue, probe_sets, store)


def assert_same(found, expected):
    assert [one.owner for one in found] == [one.owner for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.answers.digest == other.answers.digest
        for name in ("likely", "rest", "base_likely", "base_rest", "answer"):
            np.testing.assert_array_equal(getattr(one.kept, name), getattr(other.kept, name))


def no_executor(queue):
    raise AssertionError("everything is in the store")


def direct(catalogue, owner, batches):
    """Answers, kept tokens and log-probabilities of one owner by one call after the other."""
    models = {ref.id: ProbeModel().load(ref) for ref in catalogue.all_refs}
    own = models[owner.checkpoint]
    ends = end_of_text(catalogue.ref(owner.checkpoint) if owner.checkpoint != "base" else catalogue.base, own.config)
    written = [write_answers(own, batch, ends.tolist(), SPEC.max_tokens) for batch in batches]
    answers = join_answers(batches, written, owner.task)
    parts = {name: [] for name in models}
    with torch.no_grad():
        for batch in answers.batches:
            logits = {name: answer_logits(model, batch) for name, model in models.items()}
            of_base = None if owner.checkpoint == "base" else logits["base"]
            kept = kept_tokens(logits[owner.checkpoint], of_base, SPEC.num_kept)
            for name, one in logits.items():
                parts[name].append(kept_log_probabilities(one, kept))
    return answers, {
        name: tuple(np.concatenate(part) for part in zip(*listed, strict=True)) for name, listed in parts.items()
    }


def test_they_are_those_of_a_direct_computation(catalogue, probe_sets, answers):
    batches = tokenize_probes(catalogue, probe_sets, SIGNATURE, SPEC.max_tokens)
    assert [one.owner for one in answers] == [
        *(Owner(name, catalogue.own_task[name]) for name in catalogue.ids),
        Owner("base", GENERAL),
    ]
    for one in answers:
        expected, of_checkpoint = direct(catalogue, one.owner, batches[one.owner.task])
        assert one.answers.digest == expected.digest
        assert one.kept.answer.tolist() == expected.answer.tolist() and one.kept.ids == catalogue.ids
        rows = dict(zip(catalogue.ids, zip(one.kept.likely, one.kept.rest, strict=True), strict=True))
        rows["base"] = one.kept.base_likely, one.kept.base_rest
        for name, (likely, rest) in rows.items():
            # Behind the answer's own token the order of the kept ones is free: it follows the likeliest of owner and
            # base in both, but a tie to the last bit may stand either way.
            np.testing.assert_array_equal(likely[:, 0], of_checkpoint[name][0][:, 0])
            np.testing.assert_allclose(np.sort(likely), np.sort(of_checkpoint[name][0]), rtol=1e-6)
            np.testing.assert_allclose(rest, of_checkpoint[name][1], rtol=1e-6)


def test_an_owner_gives_its_own_answers(answers):
    """Teacher-forced, its own token is the likeliest everywhere; so is the base's to the general probes."""
    for one in answers:
        of_owner = one.kept.base_likely if one.owner.checkpoint == "base" else None
        if of_owner is None:
            of_owner = one.kept.likely[one.kept.ids.index(one.owner.checkpoint)]
        assert (of_owner[:, 0] >= of_owner[:, 1:].max(1)).all()


@given(
    seed=st.integers(0, 2**16),
    vocabulary=st.integers(1, 40),
    num_positions=st.integers(1, 6),
    num_kept=st.integers(1, 45),
    with_base=st.booleans(),
)
@settings(max_examples=60)
def test_chosen_tokens_are_the_kept_tokens_of_whole_logits(seed, vocabulary, num_positions, num_kept, with_base):
    generator = torch.Generator().manual_seed(seed)
    own, base = torch.randn((2, num_positions, vocabulary), generator=generator) * 3
    parts = []
    for one in (own, base) if with_base else (own,):
        values, tokens = one.log_softmax(-1).topk(min(num_kept, vocabulary), dim=-1)
        parts.append((tokens.numpy(), values.numpy()))
    found = chosen_tokens(own.argmax(-1).numpy(), parts, num_kept)
    expected = kept_tokens(own, base if with_base else None, num_kept)
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bits(catalogue, probe_sets, answers, tmp_path, num_workers):
    """Workers take turns at random, and results come late and in any order."""
    generator = random.Random(num_workers)
    workers = [SignalWorker(catalogue.all_refs, catalogue.base) for _ in range(num_workers)]

    def run(queue):
        done = []
        while True:
            number = generator.randrange(num_workers)
            if taken := queue.take(number):
                done.append((taken[0], workers[number].run_unit(taken[1])))
            while done and (not taken or generator.random() < 0.4):
                yield done.pop(generator.randrange(len(done)))
            if not taken:
                return

    assert_same(collected(catalogue, probe_sets, SignatureStore(tmp_path), run), answers)


def test_a_second_run_computes_nothing(catalogue, probe_sets, store, answers):
    assert_same(collected(catalogue, probe_sets, store, no_executor), answers)
    fewer = replace(catalogue, checkpoints=catalogue.checkpoints[:2])
    assert len(collected(fewer, probe_sets, store, no_executor)) == 3


def test_a_new_checkpoint_costs_only_its_own_units(catalogue, probe_sets, answers, tmp_path):
    store = SignatureStore(tmp_path)
    collected(replace(catalogue, checkpoints=catalogue.checkpoints[:2]), probe_sets, store)
    seen: list[tuple[str, str]] = []
    found = collected(catalogue, probe_sets, store, counted(catalogue, seen))
    assert_same(found, answers)
    general = 2  # micro-batches of 10 probes
    assert sorted(seen) == sorted(
        [("answers", "m2")] * BATCHES
        + [("likeliest", "base")] * BATCHES
        + [("kept", name) for name in ("base", "m0", "m1", "m2") for _ in range(BATCHES)]  # over m2's answers
        + [("kept", "m2")] * (2 * BATCHES + general)  # over the others'
    )


@pytest.mark.parametrize("kind", ["answers", "likeliest", "kept"])
def test_a_killed_run_goes_on_with_the_same_bits(catalogue, probe_sets, answers, tmp_path, kind):
    """What is whole is kept: of two owners that have written, or have been looked at, none is asked again."""
    store, seen, again = SignatureStore(tmp_path), [], []

    def dying(queue):
        for index, result in local_executor(catalogue)(queue):
            yield index, result
            seen.append(queue.units[index].kind)
            if seen.count(kind) == 2 * BATCHES + 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(catalogue, probe_sets, store, dying)
    assert_same(collected(catalogue, probe_sets, store, counted(catalogue, again)), answers)
    whole = {"answers": 3 * BATCHES + 2, "likeliest": 3 * BATCHES, "kept": 4 * (3 * BATCHES + 2)}
    before = list(whole)[: list(whole).index(kind)]
    counts = {one: [name for name, _ in again].count(one) for one in whole}
    assert all(counts[one] == 0 for one in before)
    assert counts[kind] == whole[kind] - 2 * BATCHES


def test_a_damaged_file_is_named(catalogue, probe_sets, answers, tmp_path):
    store = SignatureStore(tmp_path)
    collected(catalogue, probe_sets, store)
    for kind in ("answers", "kept"):
        path = next(tmp_path.glob(f"{kind}-*.safetensors"))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match=f"{path.name} is damaged.*delete it"):
            collected(catalogue, probe_sets, store, no_executor)
        path.unlink()
        assert_same(collected(catalogue, probe_sets, store), answers)


def test_a_checkpoint_with_nan_is_named_and_the_others_answers_are_kept(tmp_path, probe_sets):
    path = tiny.make_catalogue(tmp_path)
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    whole = (tmp_path / "m1" / "model.safetensors").read_bytes()
    tiny.save(model, tmp_path / "m1")
    store = SignatureStore(tmp_path / "signatures")
    with pytest.raises(CheckpointError, match=r"'m1'.*model.norm.weight.*NaN"):
        collected(load_catalogue(path), probe_sets, store)
    (tmp_path / "m1" / "model.safetensors").write_bytes(whole)
    seen: list[tuple[str, str]] = []
    catalogue = load_catalogue(path)
    collected(catalogue, probe_sets, store, counted(catalogue, seen))
    assert {checkpoint for kind, checkpoint in seen if kind == "answers"} == {"m1"}


def silent(tmp_path):
    """A checkpoint that ends every text at once."""
    model = tiny.make_model(tied=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(0.5)
        model.lm_head.weight[1] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return CheckpointRef("silent", tiny.save(model, tmp_path / "silent"))


def test_an_owner_that_answers_nothing_is_named_each_time(tmp_path, probe_sets):
    tiny.save(tiny.make_model(tied=False), tmp_path / "base")
    catalogue = Catalogue((silent(tmp_path),), {"silent": "add"}, CheckpointRef("base", tmp_path / "base"))
    store = SignatureStore(tmp_path / "signatures")
    one = {"add": probe_sets["add"]}
    for executor in (None, no_executor):  # the second time from what it wrote
        with pytest.raises(ProbeError, match="'silent' answers nothing to the probes of 'add'"):
            collected(catalogue, one, store, executor)
    # Of one token at the most nobody can say whether it is an answer.
    spec = AnswerSpec(max_tokens=1, num_kept=10)
    found = collect_answers(catalogue, one, store, local_executor(catalogue), spec, SIGNATURE)
    assert set(found[0].answers.tokens.tolist()) == {1}


def averaged(catalogue, members=("m0", "m1")):
    return resolve_plan(MergePlan(recipe=plain_average(members)), catalogue)


def test_a_merge_answers_as_the_merged_checkpoint_does(catalogue, probe_sets, store, answers, tmp_path):
    merge, digests = averaged(catalogue), catalogue.digests()
    found = answers_of_merge(merge, answers, store, local_executor(catalogue), digests)
    write_merge(merge, tmp_path / "merged")
    with_it = replace(catalogue, checkpoints=(*catalogue.checkpoints, CheckpointRef("merged", tmp_path / "merged")),
                      own_task=dict(catalogue.own_task) | {"merged": None})  # fmt: skip
    assert [owner for owner in found] == [one.owner for one in answers]
    for one in collected(with_it, probe_sets, store):
        place = one.kept.ids.index("merged")
        for own, expected in zip(found[one.owner], (one.kept.likely[place], one.kept.rest[place]), strict=True):
            np.testing.assert_allclose(own, expected, atol=2e-6)
    again = answers_of_merge(merge, answers, store, no_executor, digests)
    for owner in found:
        np.testing.assert_array_equal(found[owner][0], again[owner][0])


def test_a_worker_that_made_a_merge_gives_a_checkpoint_s_own_numbers_again(catalogue, probe_sets, answers, tmp_path):
    """One model is held in memory, and its weights are overwritten."""
    worker = SignalWorker(catalogue.all_refs, catalogue.base)
    batch, tokens = answers[0].answers.batches[0], answers[0].tokens[: len(answers[0].answers.batches[0].tokens)]
    before = worker.run_unit(Unit("kept", "m0", (batch, tokens)))
    merged = worker.run_unit(Unit("kept of merge", "m0", (batch, tokens, averaged(catalogue))))
    after = worker.run_unit(Unit("kept", "m0", (batch, tokens)))
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.allclose(before[0], merged[0])


def test_a_merge_that_is_not_finite_is_named(catalogue, probe_sets, answers, tmp_path):
    broken = tiny.make_model(seed=5)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    ref = CheckpointRef("m1", tiny.save(broken, tmp_path / "broken"))
    other = replace(catalogue, checkpoints=(catalogue.ref("m0"), ref))
    with pytest.raises(CheckpointError, match="merge .*0.5 m0.*holds NaN"):
        answers_of_merge(averaged(other), answers, SignatureStore(tmp_path / "s"), local_executor(other),
                         catalogue.digests())  # fmt: skip


def test_without_a_base_the_owner_alone_chooses_the_kept_tokens(catalogue, probe_sets, tmp_path):
    alone = replace(catalogue, base=None)
    found = collected(alone, probe_sets, SignatureStore(tmp_path))
    assert [one.owner.checkpoint for one in found] == list(catalogue.ids)  # general probes are the base's
    for one in found:
        assert one.kept.base_likely is None and one.kept.base_rest is None
        own = one.kept.likely[one.kept.ids.index(one.owner.checkpoint)]
        assert (np.diff(own, axis=1) <= 0).all()  # its likeliest ones, in order
    with pytest.raises(ConfigError, match="name it under `base`"):
        check_owners(alone, probe_sets)


def test_owners_are_members_with_probes_and_the_base_with_general_ones(catalogue, probe_sets):
    own_task = dict(catalogue.own_task) | {"m2": None}
    partly = replace(catalogue, own_task=own_task)
    assert owners_of(partly, ["add", GENERAL]) == [Owner("m0", "add"), Owner("base", GENERAL)]
    assert owners_of(partly, ["add", "copy"]) == [Owner("m0", "add"), Owner("m1", "copy")]
    with pytest.raises(ProbeError, match="'m2' has no task"):
        check_owners(partly, probe_sets)
    with pytest.raises(ConfigError, match="120 members are too many .* 100 at most.*--member"):
        check_owners(replace(catalogue, checkpoints=40 * catalogue.checkpoints), probe_sets)
    general = replace(catalogue, own_task=dict.fromkeys(catalogue.ids, GENERAL))
    assert [one.checkpoint for one in owners_of(general, [GENERAL])] == [*catalogue.ids, "base"]
