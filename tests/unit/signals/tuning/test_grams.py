"""Gram matrices are those of the inputs that layers had, and a regmean of checkpoints is the operator on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import OperatorError, PlanError
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, write_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.mergekit import write_mergekit
from simmerge_ray.merging.model import load_model
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan, read_plan, resolve_plan, write_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.setup import prepare_search
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.retention import answers_of
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.grams import gram_jobs, gram_matrices, with_grams, write_grams
from tests import reference, tiny
from tests.unit.checkpoints.test_adapters import make_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
MAX_TOKENS = 3
SPEC = SignatureSpec(batch_size=5)


def make_gpt2(seed: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size = len(dict.fromkeys(tiny.CHARACTERS)) + 2
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=None, eos_token_id=1,
            initializer_range=0.3,
        )
    )  # fmt: skip


def make_members(root, kind: str) -> Catalogue:
    """Two members, of the tasks add and copy: full ones of one family, or a LoRA adapter and a full one."""
    tiny.write_texts(root)
    make = make_gpt2 if kind == "gpt2" else (lambda seed: tiny.make_model(seed, tied=kind == "tied"))
    refs = [CheckpointRef(f"m{n}", tiny.save(make(n), root / f"m{n}")) for n in range(2)]
    if kind == "lora":
        adapter, _ = make_adapter(root / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        refs[0] = replace(refs[0], adapter=adapter)
    return Catalogue(tuple(refs), {"m0": "add", "m1": "copy"})


@pytest.fixture(scope="module", params=["tied", "untied", "gpt2", "lora"])
def setting(request, tmp_path_factory):
    """(catalogue whose members have Gram matrices, micro-batches, kind)"""
    root = tmp_path_factory.mktemp("grams")
    catalogue = make_members(root, request.param)
    batches = tokenize_probes(catalogue, load_probe_sets(root / "probes"), SPEC, MAX_TOKENS)
    jobs = gram_jobs(catalogue, batches, MAX_TOKENS, root / "grams")
    for job in jobs:
        write_grams(job)
    return with_grams(catalogue, jobs), batches, request.param


def true_grams(catalogue, batches, member):
    """{parameter: Gram matrix} from all inputs of each layer at once, padding left out; float64."""
    runner, task = ProbeModel(), catalogue.own_task[member]
    ref = catalogue.ref(member)
    answers = answers_of(runner, ref, task, batches[task], AnswerSpec(MAX_TOKENS))
    model, rows = runner.load(ref), {}
    for batch in answers.batches:
        kept = batch.attention_mask.bool().flatten()

        def note(name, kept):
            return lambda _, args: rows.setdefault(name, []).append(args[0].reshape(len(kept), -1)[kept])

        handles = [
            module.register_forward_pre_hook(note(f"{name}.weight", kept))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for handle in handles:
            handle.remove()
    inputs = {name: torch.cat(parts).double().numpy() for name, parts in rows.items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}, answers


def test_matrices_are_those_of_all_inputs(setting):
    catalogue, batches, kind = setting
    expected, answers = true_grams(catalogue, batches, "m0")
    found = gram_matrices(load_model(catalogue.ref("m0")), answers.batches)
    if kind in ("tied", "gpt2"):
        del expected["lm_head.weight"]  # an embedding as well
    assert {name for name, _ in found} == set(expected)
    assert {axis for _, axis in found} == ({0} if kind == "gpt2" else {1})
    for (name, _), gram in found.items():
        assert gram.dtype == np.float32
        np.testing.assert_allclose(gram, expected[name], rtol=1e-5, atol=1e-6 * np.abs(expected[name]).max())


@pytest.mark.parametrize("alpha", [0.9, 0.0])
def test_a_regmean_of_checkpoints_is_the_operator_on_every_linear_layer(setting, alpha):
    catalogue, batches, kind = setting
    weights = {"m0": 0.4, "m1": 1.2}
    resolved = resolve_plan(MergePlan(recipe=recipe_of(make_arm("regmean", {"alpha": alpha}), weights)), catalogue)
    merged = dict(merged_tensors(resolved))
    grams = [true_grams(catalogue, batches, member)[0] for member in catalogue.ids]
    models = [load_model(ref) for ref in catalogue.checkpoints]
    parameters = [{n: p.detach().double().numpy() for n, p in model.named_parameters()} for model in models]
    prefix = f"{models[0].base_model_prefix}."
    embedding = {id(models[0].get_input_embeddings().weight)}
    num_solved = 0
    for name, parameter in models[0].named_parameters():
        parts = [of_member[name] for of_member in parameters]
        solved = [of_member[name] for of_member in grams] if name in grams[0] and id(parameter) not in embedding else ()
        num_solved += bool(solved)
        expected = reference.regmean(None, parts, tuple(weights.values()), alpha, solved, 0 if kind == "gpt2" else 1)
        stored = name if name in merged else name.removeprefix(prefix)
        # Gram matrices are kept in float32
        np.testing.assert_allclose(merged[stored].numpy(), expected, rtol=1e-3, atol=2e-5, err_msg=name)
    assert num_solved == (8 if kind == "gpt2" else 14) + (kind in ("untied", "lora"))


def test_a_plan_file_and_a_catalogue_keep_them(setting, tmp_path):
    catalogue, _, _ = setting
    resolved = resolve_plan(MergePlan(recipe=recipe_of(make_arm("regmean"), {"m0": 1.0, "m1": 1.0})), catalogue)
    write_plan(tmp_path / "plan.json", resolved)
    again, _ = read_plan(tmp_path / "plan.json")
    assert [ref.grams for ref in again.checkpoints] == [ref.grams for ref in catalogue.checkpoints]
    write_catalogue(tmp_path / "c.yaml", catalogue)
    assert [ref.grams for ref in load_catalogue(tmp_path / "c.yaml").checkpoints] == [
        ref.grams for ref in catalogue.checkpoints
    ]
    with pytest.raises(PlanError, match="mergekit has no n-ary 'regmean'"):
        write_mergekit(resolved)


@pytest.mark.parametrize("setting", ["tied"], indirect=True)
def test_they_are_written_once_under_what_they_depend_on(setting, monkeypatch):
    catalogue, batches, _ = setting
    store = catalogue.checkpoints[0].grams.parent
    jobs = gram_jobs(catalogue, batches, MAX_TOKENS, store)
    assert [job.out for job in jobs] == [ref.grams for ref in catalogue.checkpoints]
    fewer = {task: found[:1] for task, found in batches.items()}
    assert {job.out for job in gram_jobs(catalogue, fewer, MAX_TOKENS, store)}.isdisjoint({job.out for job in jobs})
    assert gram_jobs(catalogue, batches, MAX_TOKENS + 1, store)[0].out != jobs[0].out
    monkeypatch.setattr("simmerge_ray.signals.tuning.grams.gram_matrices", None)  # nothing is computed again
    for job in jobs:
        write_grams(job)
    assert all(name.startswith("model.layers.") for name in read_headers(catalogue.checkpoints[0].gram_ref))


@pytest.mark.parametrize("setting", ["tied"], indirect=True)
def test_without_them_there_is_one_error_with_the_remedy(setting):
    catalogue, _, _ = setting
    plan = MergePlan(recipe=recipe_of(make_arm("regmean"), {"m0": 1.0, "m1": 1.0}))
    bare = replace(catalogue, checkpoints=(catalogue.checkpoints[0], replace(catalogue.checkpoints[1], grams=None)))
    with pytest.raises(OperatorError, match=r"needs Gram matrices, and m1 has none; make them by `simmerge tune .*"):
        resolve_plan(plan, bare)
    with pytest.raises(PlanError, match="'regmean' takes checkpoints, not the result of a step"):
        fold_plan(("a", "b", "c"), [make_arm("regmean")])


@pytest.mark.parametrize("setting", ["tied"], indirect=True)
def test_labels_of_other_matrices_have_other_keys(setting, tmp_path):
    catalogue, batches, _ = setting
    jobs = gram_jobs(catalogue, {task: found[:1] for task, found in batches.items()}, MAX_TOKENS, tmp_path / "grams")
    for job in jobs:
        write_grams(job)
    task = AnswersTask("m0", [([3, 4], [5])])
    keys = {}
    for name, known in (("all", catalogue), ("fewer", with_grams(catalogue, jobs))):
        search = prepare_search(known, {task.name: task}, SearchConfig(pairs="all"), str(tmp_path), plans_given=True)
        for arm in ("regmean", "linear"):
            plan = MergePlan(recipe=recipe_of(make_arm(arm), {"m0": 1.0, "m1": 1.0}))
            keys[name, arm] = search.key(plan, task.name)
    assert keys["all", "regmean"] != keys["fewer", "regmean"] and keys["all", "linear"] == keys["fewer", "linear"]
