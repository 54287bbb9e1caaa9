"""Tuning: its gradient is that of finite differences, low-rank members are those written out, it can be resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.plans.recipe import GroupWeights
from simmerge_ray.signals.candidates.answers import (
    answer_logits,
    join_answers,
    kept_log_probabilities,
    kept_tokens,
)
from simmerge_ray.signals.tuning import tuner
from simmerge_ray.signals.tuning.groups import groups_of, member_weight
from simmerge_ray.signals.tuning.memory import recompute_layers
from simmerge_ray.signals.tuning.tuner import CoefficientModel, TuneState, TuningBatch, tune_coefficients
from simmerge_ray.signals.tuning.vectors import DenseVector, LowRankVector
from tests import tiny

GRANULARITIES = ("global", "layer", "block", "tensor")


def make_model(dtype=torch.float64):
    """A small GPT-2, which computes in the dtype of its weights throughout; Llama's norms are float32 in any case."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=1, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype).eval()


def setting(dtype=torch.float64, granularity="block", num_kept=8, low_rank=False, held_out=0.0):
    """A small base, two members around it, and their answers to four made-up probes each."""
    base = {name: p.detach().clone() for name, p in make_model(dtype).named_parameters()}
    generator = torch.Generator().manual_seed(5)
    vectors, batches = [], []
    for _ in range(2):
        own = {}
        for name, tensor in base.items():
            if low_rank and tensor.dim() == 2:
                up = torch.randn((tensor.shape[0], 2), generator=generator, dtype=dtype)
                down = torch.randn((2, tensor.shape[1]), generator=generator, dtype=dtype)
                own[name] = LowRankVector(up, down, 0.05)
            else:
                own[name] = DenseVector(0.1 * torch.randn(tensor.shape, generator=generator, dtype=dtype))
        vectors.append(own)
    for member, own in enumerate(vectors):
        expert = make_model(dtype)
        with torch.no_grad():
            for name, parameter in expert.named_parameters():
                own[name].add_to(parameter, 1.0)
        ids = torch.randint(2, 40, (4, 5), generator=generator)
        written = torch.randint(2, 40, (4, 3), generator=generator).tolist()
        answers = join_answers([TokenBatch(ids, torch.ones_like(ids))], [written], f"t{member}").batches[0]
        with torch.no_grad():
            logits = answer_logits(expert, answers)
        kept = kept_tokens(logits, None, num_kept)
        likely, rest = kept_log_probabilities(logits, kept)
        out = answers.answer >= round(4 * (1 - held_out))
        batches.append(
            TuningBatch(
                answers, torch.from_numpy(kept), torch.from_numpy(likely).to(dtype), torch.from_numpy(rest).to(dtype),
                torch.full((len(answers.tokens),), 1.0 / len(answers.tokens), dtype=dtype), out,
            )
        )  # fmt: skip
    return CoefficientModel(make_model(dtype), base, vectors, groups_of(base, granularity)), batches


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("objective", ["kl", "nll", "entropy"])
def test_the_gradient_is_that_of_finite_differences(granularity, objective):
    model, batches = setting(granularity=granularity)
    at = np.random.default_rng(0).uniform(0.2, 0.8, size=(2, len(model.group_names)))
    _, _, gradient = model.objective(at, batches, objective, gradient=True)
    step = 1e-5
    for member, group in list(np.ndindex(at.shape))[:12]:
        shifted = [at.copy(), at.copy()]
        shifted[0][member, group] += step
        shifted[1][member, group] -= step
        up, down = (model.objective(one, batches, objective, gradient=False)[0] for one in shifted)
        assert gradient[member, group] == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-8)


def test_layers_that_run_twice_and_a_loss_in_parts_change_nothing(monkeypatch):
    model, batches = setting(held_out=0.25)
    at = np.full((2, len(model.group_names)), 0.4)
    whole = model.objective(at, batches, "kl", gradient=True)
    monkeypatch.setattr(tuner, "LOSS_POSITIONS", 5)
    recompute_layers(model._model)
    again = model.objective(at, batches, "kl", gradient=True)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_low_rank_members_are_those_written_out():
    low, batches = setting(low_rank=True)
    dense = CoefficientModel(
        make_model(),
        low.base,
        [
            {
                name: DenseVector(v.scale * v.up @ v.down) if isinstance(v, LowRankVector) else v
                for name, v in own.items()
            }
            for own in low.vectors
        ],
        groups_of(low.base, "block"),
    )
    at = np.full((2, len(low.group_names)), 0.4)
    for one, other in zip(
        low.objective(at, batches, "kl", True), dense.objective(at, batches, "kl", True), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_a_member_alone_loses_nothing():
    model, batches = setting(num_kept=60)
    at = np.zeros((2, len(model.group_names)))
    at[0] = 1.0
    assert model.objective(at, batches[:1], "kl", False)[0] == pytest.approx(0.0, abs=1e-6)
    assert model.objective(at, batches[1:], "kl", False)[0] > 0.01


def arrays_of(state: TuneState) -> dict[str, list]:
    return {name: array.tolist() for name, array in state.arrays().items()}


def test_tuning_goes_down_and_goes_on_to_the_same_bits():
    model, batches = setting(held_out=0.25)
    start = np.full((2, len(model.group_names)), 0.5)
    spec = TuneConfig(num_steps=12, patience=12, pull=0.0)
    kept: list[dict[str, np.ndarray]] = []
    whole = tune_coefficients(model, batches, start, spec, keep=lambda state: kept.append(state.arrays()))
    assert len(kept) == whole.num_steps == 12 and whole.objectives[-1][0] < whole.objectives[0][0]
    assert whole.objectives[whole.best_step][1] == min(held for _, held in whole.objectives)
    assert np.array_equal(whole.best, whole.points[whole.best_step])
    evaluated = []
    goes_on = tune_coefficients(model, batches, start, spec, TuneState.from_arrays(kept[4]), evaluated.append)
    assert arrays_of(goes_on) == arrays_of(whole) and len(evaluated) == 12 - 5


def test_a_state_of_other_points_is_not_believed():
    model, batches = setting(held_out=0.25)
    start = np.full((2, len(model.group_names)), 0.5)
    spec = TuneConfig(num_steps=5)
    whole = tune_coefficients(model, batches, start, spec)
    other = TuneState.from_arrays(whole.arrays())
    other.points[2] = other.points[2] + 1e-3
    other.objectives[2:] = [(0.0, 0.0)] * 3
    assert arrays_of(tune_coefficients(model, batches, start, spec, other)) == arrays_of(whole)


def test_where_it_converges_the_gradient_with_the_pull_is_zero():
    model, batches = setting()
    start = np.full((2, len(model.group_names)), 0.5)
    spec = TuneConfig(num_steps=400, patience=400)
    found = tune_coefficients(model, batches, start, spec)
    assert found.num_steps < 400
    pulled = [
        value + spec.pull * np.mean((point - start) ** 2)
        for point, (value, _) in zip(found.points, found.objectives, strict=True)
    ]
    end = int(np.argmin(pulled))
    gradient = found.gradients[end] + 2 * spec.pull * (found.points[end] - start) / start.size
    assert np.abs(gradient).max() < 1e-2 * np.abs(found.gradients[0]).max()


def test_patience_is_over_when_the_held_out_objective_falls_by_less_than_a_hundredth():
    steady = [(0.0, 1.0 - 0.02 * step) for step in range(8)]
    assert not TuneState(objectives=steady).is_over(100, 2) and TuneState(objectives=steady).is_over(8, 2)
    for stuck in (0.993, 1.2):
        assert not TuneState(objectives=[(0.0, 1.0), (0.0, stuck)]).is_over(100, 2)
        assert TuneState(objectives=[(0.0, 1.0), (0.0, stuck), (0.0, stuck - 0.001)]).is_over(100, 2)


def test_a_strong_pull_stays_at_the_start():
    model, batches = setting()
    start = np.full((2, len(model.group_names)), 0.5)
    free = tune_coefficients(model, batches, start, TuneConfig(num_steps=10, pull=0.0))
    held = tune_coefficients(model, batches, start, TuneConfig(num_steps=10, pull=100.0))
    assert np.abs(held.best - start).mean() < 0.5 * np.abs(free.best - start).mean()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_are_filters_that_give_every_tensor_its_own_coefficient(granularity):
    names = [name for name, _ in tiny.make_model(num_layers=12).named_parameters()]
    groups = groups_of(names, granularity)
    values = {group: float(number) for number, group in enumerate(sorted(set(groups.values())))}
    weight = member_weight(values)
    for name in names:
        found = weight.of(name) if isinstance(weight, GroupWeights) else weight
        assert found == values[groups[name]], name
    sizes = {"global": 1, "layer": 13, "block": 37, "tensor": len(names)}
    assert len(values) == sizes[granularity]


def test_an_unknown_granularity_is_one_error():
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        groups_of(["a"], "layers")  # type: ignore[arg-type]
