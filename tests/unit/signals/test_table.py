"""The signal table of real tiny checkpoints against transformers run pair by pair, and its file."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from simmerge_ray.catalogue import load_catalogue
from simmerge_ray.checkpoints import TensorReader
from simmerge_ray.errors import CheckpointError, ConfigError, PlanError, ProbeError
from simmerge_ray.probes import load_probe_sets
from simmerge_ray.signals.features import SIGNALS, feature_columns, scaled_features, swapped_features
from simmerge_ray.signals.table import compute_signals, read_signal_table
from tests import reference, tiny


@pytest.fixture(scope="module")
def probe_sets(catalogue_path):
    return load_probe_sets(catalogue_path.parent / "probes")


@pytest.fixture(scope="module")
def table(catalogue, probe_sets):
    return compute_signals(catalogue, probe_sets, batch_size=8)


def outputs_one_by_one(ref, texts):
    """Per probe, without batching or padding: float64 log-probabilities, hidden states, attention."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ref.path)
    model = AutoModelForCausalLM.from_pretrained(ref.path, attn_implementation="eager").double()
    found = []
    for text in texts:
        with torch.no_grad():
            result = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True, output_attentions=True)
        found.append(
            (
                reference.log_softmax(result.logits[0].numpy()),
                [layer[0].numpy() for layer in result.hidden_states],
                [layer[0].numpy() for layer in result.attentions],
                tokenizer(text)["input_ids"],
            )
        )
    return found


@pytest.mark.parametrize("task", ["add", "copy"])
def test_probe_signals_equal_one_model_and_one_text_at_a_time(table, catalogue, probe_sets, task):
    texts = [probe.text for probe in probe_sets[task].probes]
    left, right = catalogue.checkpoints[0], catalogue.checkpoints[2]
    a, b = outputs_one_by_one(left, texts), outputs_one_by_one(right, texts)
    features = table.get(left.id, right.id, task).features
    kl = np.array([reference.kl(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x[0], y[0], strict=True)])
    assert features["kl_lr_mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert features["kl_lr_q90"] == pytest.approx(np.quantile(kl, 0.9), rel=1e-5)
    assert features["kl_rl_median"] == table.get(right.id, left.id, task).features["kl_lr_median"]
    hidden = [
        reference.cosine(u, v)
        for x, y in zip(a, b, strict=True)
        for p, q in zip(x[1], y[1], strict=True)
        for u, v in zip(p, q, strict=True)
    ]
    assert features["activation_cosine_mean"] == pytest.approx(np.mean(hidden), abs=1e-6)
    assert features["activation_cosine_min"] == pytest.approx(np.min(hidden), abs=1e-5)
    assert features["activation_cosine_sd"] == pytest.approx(np.std(hidden), abs=1e-5)
    rows = [
        reference.cosine(u, v)
        for x, y in zip(a, b, strict=True)
        for p, q in zip(x[2], y[2], strict=True)
        for heads in zip(p, q, strict=True)
        for u, v in zip(heads[0][1:], heads[1][1:], strict=True)  # the first query sees itself alone
    ]
    assert features["attention_cosine_mean"] == pytest.approx(np.mean(rows), abs=1e-6)
    losses = [-x[0][t, x[3][t + 1]] for x in a for t in range(len(x[3]) - 1)]
    assert features["loss_left"] == pytest.approx(np.mean(losses), rel=1e-5)
    entropies = [-(np.exp(p) @ p) for x in a for p in x[0]]
    assert features["entropy_left"] == pytest.approx(np.mean(entropies), rel=1e-5)


def test_weight_signals_are_global_and_by_kind(table, catalogue):
    readers = [TensorReader(ref) for ref in (catalogue.base, *catalogue.checkpoints[:2])]
    flat = [
        np.concatenate([reader.read(name).double().numpy().ravel() for name in reader.specs if "mlp" in name])
        for reader in readers
    ]
    features = table.get("m0", "m1", "add").features
    assert features["weight_cosine_mlp"] == pytest.approx(reference.cosine(flat[1], flat[2]), rel=1e-7)
    expected = reference.cosine(flat[1] - flat[0], flat[2] - flat[0])
    assert features["task_vector_cosine_mlp"] == pytest.approx(expected, abs=1e-5)
    assert features["weight_cosine_global"] != features["weight_cosine_mlp"]


def test_another_micro_batch_size_agrees_to_1e_6(table, catalogue, probe_sets):
    other = compute_signals(catalogue, probe_sets, batch_size=5)
    for key, row in table.rows.items():
        for column, value in row.features.items():
            assert other.rows[key].features[column] == pytest.approx(value, rel=1e-6, abs=1e-6), column


def test_swapping_a_pair_gives_the_row_of_the_swapped_pair(table):
    for left, right in itertools.permutations(table.checkpoint_ids, 2):
        swapped = table.get(left, right, "add").swap()
        assert swapped.features == pytest.approx(dict(table.get(right, left, "add").features), rel=1e-9, abs=1e-9)


def test_every_feature_column_belongs_to_a_signal_and_scales_to_a_finite_number(table):
    assert table.columns == feature_columns(with_base=True)
    assert len(set(table.columns)) == len(table.columns) == sum(len(s.columns) for s in SIGNALS.values())
    features = dict(table.get("m0", "m1", "add").features)
    assert np.isfinite(scaled_features(features, table.columns)).all()
    assert swapped_features(swapped_features(features)) == features


def test_without_a_base_the_task_vector_signals_are_absent(catalogue_path, probe_sets, tmp_path):
    content = catalogue_path.read_text().split("checkpoints:")[1]
    (tmp_path / "c.yaml").write_text("checkpoints:" + content.replace("path: ", f"path: {catalogue_path.parent}/"))
    table = compute_signals(load_catalogue(tmp_path / "c.yaml"), {"add": probe_sets["add"]}, batch_size=8)
    assert table.columns == feature_columns(with_base=False)
    assert "weight_l2_global" in table.columns and "task_vector_cosine_global" not in table.columns


def test_the_file_gives_the_table_back_and_names_what_it_was_made_from(table, tmp_path, catalogue):
    table.write(tmp_path / "pairs.parquet")
    again = read_signal_table(tmp_path / "pairs.parquet")
    assert again == table
    assert again.provenance["checkpoints"] == catalogue.digests()
    assert set(again.provenance["probes"]) == {"add", "copy"}


def test_unknown_names_and_pairs_of_one_checkpoint_are_refused(table):
    with pytest.raises(PlanError, match=r"unknown checkpoint 'm9'.*known: m0, m1, m2"):
        table.get("m0", "m9", "add")
    with pytest.raises(PlanError, match="unknown task 'ad'"):
        table.get("m0", "m1", "ad")
    with pytest.raises(PlanError, match="two different"):
        table.get("m0", "m0", "add")


def test_files_that_are_no_signal_tables_are_refused(tmp_path, table):
    with pytest.raises(ConfigError, match="no signal table"):
        read_signal_table(tmp_path / "absent.parquet")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="not a signal table"):
        read_signal_table(tmp_path / "x.parquet")


def test_a_checkpoint_with_nan_is_named(tmp_path, probe_sets):
    path = tiny.make_catalogue(tmp_path)
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, tmp_path / "m1")
    with pytest.raises(CheckpointError, match=r"'m1'.*model.norm.weight.*NaN"):
        compute_signals(load_catalogue(path), probe_sets)


def test_probes_that_are_too_long_or_too_short_are_named(catalogue, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a" * 50}) + "\n")
    with pytest.raises(ProbeError, match="'aaaa.*has 50 tokens; allowed are 2 to 20"):
        compute_signals(catalogue, load_probe_sets(tmp_path), max_tokens=20)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ProbeError, match="has 1 tokens"):
        compute_signals(catalogue, load_probe_sets(tmp_path))


def test_one_checkpoint_is_no_pair(tmp_path):
    path = tiny.make_catalogue(tmp_path, num_checkpoints=1)
    with pytest.raises(ConfigError, match="at least two"):
        compute_signals(load_catalogue(path), load_probe_sets(tmp_path / "probes"))
    shutil.rmtree(tmp_path / "probes")
