"""The signal table of real tiny checkpoints against float64 references, pair by pair; signatures; failures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from simmerge_ray.base.errors import CheckpointError, ConfigError, PlanError, ProbeError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.signals import compute
from simmerge_ray.signals.bounds import stages_for, working_bytes
from simmerge_ray.signals.compute import compute_signals, local_executor
from simmerge_ray.signals.features import SIGNALS, column_signal, feature_columns, scaled_features, swapped_features
from simmerge_ray.signals.queue import Unit, WorkQueue
from simmerge_ray.signals.signature import NUM_GREEDY_TOKENS, SignatureSpec, SignatureStore
from simmerge_ray.signals.stages import LayerRange, model_bytes
from simmerge_ray.signals.table import read_signal_table
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.weights import tensor_kind, tensor_layer
from tests import reference, tiny
from tests.readers import TensorReader
from tests.unit.signals.executors import counted

SPEC = SignatureSpec(batch_size=8, num_positions=100, num_attention_positions=30, num_coordinates=1000)


@pytest.fixture(scope="module")
def probe_sets(catalogue_path):
    return load_probe_sets(catalogue_path.parent / "probes")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SignatureStore(tmp_path_factory.mktemp("signatures"))


@pytest.fixture(scope="module")
def table(catalogue, probe_sets, store):
    return compute_signals(catalogue, probe_sets, SPEC, store=store)


def float64_weights(catalogue, *ids):
    found = []
    for checkpoint_id in ids:
        reader = TensorReader(catalogue.ref(checkpoint_id))
        found.append({name: reader.read(name).double().numpy() for name in reader.specs})
    return found


def expected_features(catalogue, left_outputs, right_outputs, left, right):
    weights = float64_weights(catalogue, "base", left, right)
    names = sorted(weights[0])
    kinds = {name: tensor_kind(name) for name in names}
    layers = {name: tensor_layer(name) for name in names}
    return reference.pair_features(left_outputs, right_outputs, weights, names, kinds, layers)


def assert_close(features, expected, tolerance, floor=0.0):
    for column, value in features.items():
        wanted = expected[column]
        assert abs(value - wanted) <= tolerance * abs(wanted) + floor, (column, value, wanted)


def signatures(catalogue, probe_sets, store):
    found = compute.Signatures(catalogue, catalogue.digests(), SPEC, store, local_executor(catalogue))
    return found, found.tokens(tokenize_probes(catalogue, probe_sets, SPEC))


@pytest.mark.parametrize("noise", [0.05, 0.0012])  # KL about 1, and 1e-4 with l2 at a relative distance of 1e-2
def test_every_signal_equals_the_float64_reference_pair_by_pair(noise, tmp_path):
    path = tiny.make_catalogue(tmp_path, num_checkpoints=5, noise=noise)
    catalogue, probe_sets = load_catalogue(path), load_probe_sets(tmp_path / "probes")
    store = SignatureStore(tmp_path / "signatures")
    table = compute_signals(catalogue, probe_sets, SPEC, store=store)
    found, tokens = signatures(catalogue, probe_sets, store)
    for left, right in itertools.combinations(catalogue.ids, 2):
        sides = [vars(found.outputs(side, tokens["add"])) for side in (left, right)]
        features = table.get(left, right, "add").features
        # The floor is for values that are zero but for rounding: cosines and log ratios of unrelated task vectors.
        assert_close(features, expected_features(catalogue, *sides, left, right), 1e-5, floor=2e-8)
        assert features["kl_lr_mean"] > 3e-5


def one_text_at_a_time(ref, tokens):
    """A float64 model, text by text without padding, at the sampled positions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ref.path, attn_implementation="eager").double()
    logits, hidden, attention = [], [], []
    for batch in tokens.batches:
        for row, column, keep in zip(batch.rows, batch.columns, batch.with_attention, strict=True):
            ids = batch.input_ids[row, : column + 1][None]
            with torch.no_grad():
                result = model(ids, output_hidden_states=True, output_attentions=True)
            logits.append(result.logits[0, -1].numpy())
            hidden.append(np.stack([layer[0, -1].numpy() for layer in result.hidden_states]))
            if keep:
                rows = np.stack([layer[0, :, -1].numpy() for layer in result.attentions])
                attention.append(np.pad(rows, ((0, 0), (0, 0), (0, tokens.max_tokens - rows.shape[-1]))))
    return {
        "logits": np.stack(logits),
        "hidden": np.stack(hidden, axis=1),
        "attention": np.stack(attention, axis=2),
        "greedy": np.concatenate([batch.greedy.numpy() for batch in tokens.batches]),
        "next_token": np.concatenate([batch.next_token.numpy() for batch in tokens.batches]),
    }


def test_signals_equal_a_float64_model_run_one_text_at_a_time(table, catalogue, probe_sets, store):
    _, tokens = signatures(catalogue, probe_sets, store)
    left, right = catalogue.checkpoints[0], catalogue.checkpoints[2]
    sides = [one_text_at_a_time(ref, tokens["copy"]) for ref in (left, right)]
    expected = expected_features(catalogue, *sides, left.id, right.id)
    # A float32 forward pass is exact to about 1e-6 of a logit.
    assert_close(table.get(left.id, right.id, "copy").features, expected, 1e-5, floor=2e-6)


def test_the_sampled_mode_is_within_its_stated_error(table, catalogue, probe_sets, store):
    sampled = compute_signals(catalogue, probe_sets, SPEC, weights="sampled", store=store)
    assert sampled.provenance["weights"] == "sampled"
    assert table.provenance["weights"] == "exact"
    error = 4 / np.sqrt(SPEC.num_coordinates)  # four standard deviations of a cosine per tensor
    for key, row in table.rows.items():
        other = sampled.rows[key].features
        for column, value in row.features.items():
            if column_signal(column).family in ("divergence", "activations", "attention"):
                assert other[column] == value, column
            if "cosine" in column or "conflict" in column or "overlap" in column:
                assert abs(other[column] - value) <= error, column
            if column.startswith(("task_vector_norm", "weight_l2_global")):
                assert other[column] == pytest.approx(value, rel=error, abs=1e-6), column


def test_another_micro_batch_and_block_size_agree_to_1e_6(table, catalogue, probe_sets):
    spec = SignatureSpec(**(vars(SPEC) | {"batch_size": 5, "num_positions": 10_000, "num_attention_positions": 10_000}))
    whole = SignatureSpec(**(vars(spec) | {"batch_size": 8}))
    first = compute_signals(catalogue, probe_sets, whole)
    other = compute_signals(catalogue, probe_sets, spec, block=777)
    for key, row in first.rows.items():
        for column, value in row.features.items():
            assert other.rows[key].features[column] == pytest.approx(value, rel=1e-6, abs=2e-6), column


def test_swapping_a_pair_gives_the_row_of_the_swapped_pair(table):
    for left, right in itertools.permutations(table.checkpoint_ids, 2):
        swapped = table.get(left, right, "add").swap()
        assert swapped.features == pytest.approx(dict(table.get(right, left, "add").features), rel=1e-9, abs=1e-12)


def test_every_feature_column_belongs_to_a_signal_and_scales_to_a_finite_number(table):
    assert table.columns == feature_columns(with_base=True)
    assert len(set(table.columns)) == len(table.columns) == sum(len(s.columns) for s in SIGNALS.values())
    features = dict(table.get("m0", "m1", "add").features)
    assert np.isfinite(scaled_features(features, table.columns)).all()
    assert swapped_features(swapped_features(features)) == features
    for wrong in ({}, features | {"kl_lr_mean": -1.0}):
        with pytest.raises(ConfigError, match="cannot be scaled"):
            scaled_features(wrong, ["kl_lr_mean"])
    del features["kl_lr_mean"]
    with pytest.raises(ConfigError, match="have 'kl_rl_mean' and not 'kl_lr_mean'"):
        swapped_features(features)


def test_pairs_with_the_base_are_in_the_table_without_task_vectors(table):
    row = table.rows["base", "m0", "add"]
    assert set(row.features) == set(feature_columns(True, base_pair=True))
    assert row.features["task_vector_norm_left"] == 0.0
    assert "base" not in table.checkpoint_ids
    with pytest.raises(PlanError, match="unknown checkpoint 'base'"):
        table.get("base", "m0", "add")


def test_without_a_base_its_signals_are_absent(catalogue_path, probe_sets, tmp_path):
    content = catalogue_path.read_text().split("checkpoints:")[1]
    (tmp_path / "c.yaml").write_text("checkpoints:" + content.replace("path: ", f"path: {catalogue_path.parent}/"))
    catalogue = load_catalogue(tmp_path / "c.yaml")
    for weights in ("exact", "sampled"):
        table = compute_signals(catalogue, {"add": probe_sets["add"]}, SPEC, weights)
        assert table.columns == feature_columns(with_base=False)
        assert "weight_l2_global" in table.columns and "task_vector_cosine_global" not in table.columns
        assert not any(column.startswith("kl_greedy") for column in table.columns)


def test_the_file_gives_the_table_back_and_names_what_it_was_made_from(table, tmp_path, catalogue):
    table.write(tmp_path / "pairs.parquet")
    again = read_signal_table(tmp_path / "pairs.parquet")
    assert again == table
    assert again.provenance["checkpoints"] == catalogue.digests()
    assert set(again.provenance["probes"]) == {"add", "copy"}


def test_a_new_checkpoint_costs_only_itself(tmp_path, probe_sets):
    path = tiny.make_catalogue(tmp_path, num_checkpoints=4)
    content = path.read_text()
    path.write_text(content.split("- id: m3")[0])
    store = SignatureStore(tmp_path / "signatures")
    old = compute_signals(load_catalogue(path), probe_sets, SPEC, "sampled", store)
    path.write_text(content)
    seen: list[tuple[str, str]] = []
    catalogue = load_catalogue(path)
    new = compute_signals(catalogue, probe_sets, SPEC, "sampled", store, counted(catalogue, seen))
    assert {checkpoint for _, checkpoint in seen} == {"m3"}
    for key, row in old.rows.items():
        for column, value in row.features.items():
            assert new.rows[key].features[column] == pytest.approx(value, rel=1e-9, abs=1e-12), column


def test_a_checkpoint_with_nan_is_named_and_the_others_signatures_are_kept(tmp_path, probe_sets):
    path = tiny.make_catalogue(tmp_path)
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, tmp_path / "m1")
    store = SignatureStore(tmp_path / "signatures")
    with pytest.raises(CheckpointError, match=r"'m1'.*model.norm.weight.*NaN") as caught:
        compute_signals(load_catalogue(path), probe_sets, SPEC, store=store)
    assert "the signatures of the other checkpoints are kept" in str(caught.value)
    assert "'m0'" not in str(caught.value) and "'m2'" not in str(caught.value)
    path.write_text("\n".join(line for line in _without(path.read_text(), "m1")))
    seen: list[tuple[str, str]] = []
    catalogue = load_catalogue(path)
    compute_signals(catalogue, probe_sets, SPEC, store=store, executor=counted(catalogue, seen))
    assert {kind for kind, _ in seen} == {"sums"}


def _without(text, checkpoint_id):
    kept = True
    for line in text.splitlines():
        if line.strip().startswith("- id:"):
            kept = checkpoint_id not in line
        if kept:
            yield line


def test_an_interrupted_run_goes_on_with_the_same_bits(table, catalogue, probe_sets, tmp_path):
    store = SignatureStore(tmp_path)
    inner = local_executor(catalogue)

    def dying(queue):
        for count, (index, result) in enumerate(inner(queue)):
            if queue.units[index].kind == "outputs" and count > 8:
                raise KeyboardInterrupt
            yield index, result

    with pytest.raises(KeyboardInterrupt):
        compute_signals(catalogue, probe_sets, SPEC, store=store, executor=dying)
    seen: list[tuple[str, str]] = []
    again = compute_signals(catalogue, probe_sets, SPEC, store=store, executor=counted(catalogue, seen))
    assert again == table
    total = 2 * 3 * 4 + 4 + 1  # micro-batches of two tasks over four checkpoints, samples, sums
    assert 0 < len(seen) < total


def test_unknown_names_and_pairs_of_one_checkpoint_are_refused(table):
    with pytest.raises(PlanError, match=r"unknown checkpoint 'm9'.*known: m0, m1, m2"):
        table.get("m0", "m9", "add")
    with pytest.raises(PlanError, match="unknown task 'ad'"):
        table.get("m0", "m1", "ad")
    with pytest.raises(PlanError, match="two different"):
        table.get("m0", "m0", "add")


def test_files_that_are_no_signal_tables_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no signal table"):
        read_signal_table(tmp_path / "absent.parquet")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="not a signal table"):
        read_signal_table(tmp_path / "x.parquet")


def probes_of(directory, *texts):
    (directory / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_probe_sets(directory)


def test_probes_of_a_wrong_length_are_named(catalogue, tmp_path):
    with pytest.raises(ProbeError, match="'aaaa.*has 50 tokens; allowed are 2 to 20"):
        compute_signals(catalogue, probes_of(tmp_path, "a" * 50), SignatureSpec(max_tokens=20))
    with pytest.raises(ProbeError, match="has 1 tokens"):
        compute_signals(catalogue, probes_of(tmp_path, "a"))
    with pytest.raises(ProbeError, match="no probe has 3 tokens"):
        compute_signals(catalogue, probes_of(tmp_path, "ab"))
    with pytest.raises(ProbeError, match=f"125 tokens and {NUM_GREEDY_TOKENS} .*'base', 128 tokens"):
        compute_signals(catalogue, probes_of(tmp_path, "a" * 125))


def test_one_checkpoint_is_no_pair_and_modes_are_named(tmp_path, catalogue, probe_sets):
    path = tiny.make_catalogue(tmp_path, num_checkpoints=1)
    with pytest.raises(ConfigError, match="at least two"):
        compute_signals(load_catalogue(path), probe_sets)
    with pytest.raises(ConfigError, match="exact, sampled, got 'some'"):
        compute_signals(catalogue, probe_sets, weights="some")


def test_in_stages_of_layers_the_table_has_the_same_bits(table, catalogue, probe_sets):
    ref = catalogue.checkpoints[0]
    memory = (working_bytes(ref, SPEC) + 0.8 * model_bytes(read_headers(ref))) / 1e9
    assert len(stages_for(ref, SPEC, memory)) == 2
    seen: list[tuple[str, str]] = []
    staged = compute_signals(catalogue, probe_sets, SPEC, executor=counted(catalogue, seen), memory_per_worker=memory)
    assert staged == table
    assert "outputs" not in {kind for kind, _ in seen} and ("stage", "m1") in seen
    with pytest.raises(ConfigError, match="raise --memory-per-worker"):
        compute_signals(catalogue, probe_sets, SPEC, memory_per_worker=0.001)


def test_a_worker_keeps_its_group_and_a_later_stage_goes_first():
    def unit(checkpoint, stage=None):
        return (
            Unit("stage", checkpoint, (LayerRange(stage, stage + 1, 4),))
            if stage is not None
            else Unit("outputs", checkpoint, ())
        )

    queue = WorkQueue([unit("a"), unit("b"), unit("a"), unit("b"), unit("c")])
    assert [queue.take(0)[0], queue.take(1)[0], queue.take(0)[0]] == [0, 1, 2]
    assert queue.take(0)[0] == 4  # nobody holds c
    assert queue.take(0)[0] == 3  # helps with b
    assert queue.take(1) is None
    queue = WorkQueue([unit("a", 0), unit("b", 0), unit("a", 2)])
    assert queue.take(0)[0] == 2


@pytest.mark.parametrize("change", [{"base": []}, {"own_task": {"m0": []}}, {"own_task": {"m0": 0}}, {"base": 5}])
def test_a_table_with_a_name_that_is_no_text_is_damaged(table, tmp_path, change):
    table.write(tmp_path / "pairs.parquet")
    found = pq.read_table(tmp_path / "pairs.parquet")
    meta = json.loads(found.schema.metadata[b"simmerge_ray"])
    meta["provenance"] |= change
    changed = found.replace_schema_metadata({"simmerge_ray": json.dumps(meta)})
    pq.write_table(changed, tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match="is damaged .*a name is"):
        read_signal_table(tmp_path / "pairs.parquet")
