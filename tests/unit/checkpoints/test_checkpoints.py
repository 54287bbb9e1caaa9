"""Headers, identity and compatibility of checkpoints, and the catalogue file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import CheckpointError, ConfigError, IncompatibleCheckpointsError, PlanError
from simmerge_ray.checkpoints.catalogue import load_catalogue, write_catalogue
from simmerge_ray.checkpoints.compatibility import check_compatible
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, locate_checkpoint
from tests import tiny
from tests.readers import TensorReader


@pytest.fixture
def copy(catalogue, tmp_path):
    """A copy of m0 that a test may damage."""
    shutil.copytree(catalogue.checkpoints[0].path, tmp_path / "copy")
    return CheckpointRef("copy", tmp_path / "copy")


def test_headers_agree_with_the_tensors(catalogue):
    ref = catalogue.checkpoints[0]
    reader = TensorReader(ref)
    assert list(reader.specs) == sorted(reader.specs)
    for name, spec in reader.specs.items():
        assert tuple(reader.read(name).shape) == spec.shape and spec.dtype == "F32"


def test_sharding_does_not_change_a_checkpoint_but_one_bit_does(copy, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(copy.path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    sharded = CheckpointRef("sharded", tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert checkpoint_digest(sharded) == checkpoint_digest(copy)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert checkpoint_digest(CheckpointRef("changed", tmp_path / "changed")) != checkpoint_digest(copy)


def test_a_truncated_file_is_refused_from_its_header(copy):
    file = copy.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"'copy'.*truncated"):
        read_headers(copy)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../base/model.safetensors"}, {"a": "/etc/passwd"}, {"a": ".."}, {"a": 1}, {"a": ["x"]}, [], "x"],
)
def test_an_index_that_names_other_files_than_its_own_is_refused(copy, weight_map):
    (copy.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="which is no safetensors file beside it|has no 'weight_map'"):
        read_headers(copy)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{broken json}!!!", b"\xff" * 16])
def test_a_damaged_header_is_refused(copy, content):
    (copy.path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="'copy'"):
        read_headers(copy)


def test_missing_directories_shards_and_other_formats_are_named(copy, tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_headers(CheckpointRef("x", tmp_path / "absent"))
    (copy.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        read_headers(copy)
    for name in ("model.safetensors.index.json", "model.safetensors"):
        (copy.path / name).unlink()
    for name, hint in (
        ("x.gguf", "quantised GGUF file: merge the checkpoint that it was made of .*gguf_file='x.gguf'"),
        ("consolidated.pth", "consolidated.pth is a pickle under a name"),
        ("model.msgpack", "weights are Flax's"),
    ):
        (copy.path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=hint):
            read_headers(copy)
        (copy.path / name).unlink()
    with pytest.raises(CheckpointError, match="is a quantised GGUF file"):
        locate_checkpoint("a/model.gguf")


def test_every_incompatibility_is_in_one_message(catalogue, tmp_path):
    tiny.save(tiny.make_model(num_layers=1, tied=False), tmp_path / "shallow")
    tiny.save(tiny.make_model(), tmp_path / "words", characters=tiny.CHARACTERS[::-1])
    refs = [*catalogue.checkpoints[:1], CheckpointRef("shallow", tmp_path / "shallow")]
    refs += [CheckpointRef("words", tmp_path / "words"), CheckpointRef("gone", tmp_path / "gone")]
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        check_compatible(refs)
    message = str(caught.value)
    assert "num_hidden_layers: 'shallow' has 1, 'm0' has 2" in message
    assert "'shallow' lacks model.layers.1" in message
    assert "'shallow' also has lm_head.weight" in message
    assert "'words' and 'm0' have different vocabularies" in message
    assert "'gone'" in message


def test_a_catalogue_survives_its_file(catalogue, tmp_path):
    write_catalogue(tmp_path / "c.yaml", catalogue)
    again = load_catalogue(tmp_path / "c.yaml")
    assert again == catalogue


def test_pairs_and_tasks_of_a_catalogue(catalogue):
    assert catalogue.pairs("all") == [("m0", "m1"), ("m0", "m2"), ("m1", "m2")]
    assert catalogue.pairs() == [("m0", "m1"), ("m1", "m2")]  # m0 and m2 share the task add
    assert catalogue.tasks_of(("m0", "m1")) == ("add", "copy")
    assert catalogue.tasks_of(("m0", "m2")) == ("add",)
    with pytest.raises(PlanError, match=r"unknown checkpoint 'm5'.*known: base, m0, m1, m2"):
        catalogue.ref("m5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoints: []", "checkpoints"),
        ("checkpoints: [{id: a, path: x}, {id: a, path: y}]", "id 'a' is used 2 times"),
        ("checkpoints: [{id: '../x', path: x}]", "id"),
        ("checkpoints: [{id: a, path: x, taks: y}]", "unknown key"),
    ],
)
def test_malformed_catalogues_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_catalogue(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_local_experts", 8, "num_local_experts: 'copy' has 8, .* has None"),
        ("quantization_config", {"bits": 4}, "is quantised .*dequantise it first"),
        ("quantization_config", {"quant_method": "gptq"}, r"is quantised \(GPTQ, quantization_config\); merge the"),
        ("quantization_config", {"quant_method": "awq"}, r"quantised \(AWQ, .*base_model"),
        ("quantization_config", {"load_in_4bit": True}, r"quantised \(bitsandbytes, .*`model.dequantize\(\)`"),
        ("quantization_config", {"quant_method": "fp8"}, r"quantised \(FP8, .*FineGrainedFP8Config"),
        ("quantization_config", {"quant_method": "new"}, r"quantised \(new, .*dequantise it first"),
    ],
)
def test_what_cannot_be_merged_at_all_is_refused_with_the_remedy(copy, catalogue, key, value, message):
    config = json.loads((copy.path / "config.json").read_text())
    (copy.path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(IncompatibleCheckpointsError, match=message):
        check_compatible([catalogue.checkpoints[1], copy])


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("layer.qweight", torch.int32, "AWQ, its tensors"),
        ("layer.g_idx", torch.int32, "GPTQ, its tensors"),
        ("layer.weight.absmax", torch.float32, "bitsandbytes, its tensors"),
        ("layer.weight", torch.float8_e4m3fn, "FP8, tensors of dtype F8_E4M3"),
        ("layer.weight_scale_inv", torch.float32, "FP8, its tensors"),
    ],
)
def test_quantised_tensors_are_known_without_a_config(copy, catalogue, name, dtype, message):
    tensors = load_file(copy.path / "model.safetensors")
    save_file(tensors | {name: torch.ones(4).to(dtype)}, copy.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleCheckpointsError, match=rf"is quantised \({message}\); merge the checkpoint"):
        check_compatible([catalogue.checkpoints[1], copy])
