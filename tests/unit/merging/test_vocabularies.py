"""Merges of checkpoints with different tokenizers: every token's row against a slow truth, files, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simmerge_ray.base.errors import InputError
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.mergekit.chat_templates import TEMPLATES
from simmerge_ray.merging.request import MergeRequest, read_request
from simmerge_ray.merging.write.output import WriteOptions

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
END = "<end>"
TEXTS = {
    "base": ["the quick brown fox jumps over the lazy dog, hello world"],
    "code": ["def main(argument): return argument + 1; hello quick sort"],
    "french": ["le chat noir et le chien blanc, bonjour le monde, hello"],
}
Vocabulary = dict[str, int]


def write_bpe(path: Path, texts: list[str], size: int, added: list[str], order: int = 1) -> Vocabulary:
    """A byte-level BPE tokenizer; `order` -1 gives the ids of its vocabulary the other way round."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=[END], show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    ids = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(ids, list(ids.values())[::order], strict=True))
    content["added_tokens"][0]["id"] = content["model"]["vocab"][END]
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=END)
    fast.add_tokens([AddedToken(text, special=text.startswith("<")) for text in added])
    fast.save_pretrained(path)
    return fast.get_vocab()


def write_model(path: Path, num_rows: int, seed: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": None, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, vocab_size=num_rows, tie_word_embeddings=tied))
    model.to(dtype).save_pretrained(path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Checkpoints of several vocabularies; `vocabularies.json` says which."""
    root = tmp_path_factory.mktemp("vocabularies")
    every = {
        "base": write_bpe(root / "base", TEXTS["base"], 60, []),
        "added": write_bpe(root / "added", TEXTS["base"], 60, ["<tool>", "two words"]),
        "code": write_bpe(root / "code", TEXTS["code"], 70, ["<code>"]),
        "french": write_bpe(root / "french", TEXTS["french"], 66, ["<tool>"]),
        "reordered": write_bpe(root / "reordered", TEXTS["base"], 60, [], order=-1),
        "padded": write_bpe(root / "padded", TEXTS["base"], 60, []),
        "short": write_bpe(root / "short", TEXTS["base"], 60, ["<lost>"]),
    }
    more = {"padded": 5, "short": -1}
    for seed, (name, vocabulary) in enumerate(every.items()):
        write_model(root / name, len(vocabulary) + more.get(name, 0), seed)
    for name in ("base", "code"):
        shutil.copytree(root / name, root / f"{name}-bf16")
        write_model(root / f"{name}-bf16", len(every[name]), 9, tied=True, dtype=torch.bfloat16)
    (root / "vocabularies.json").write_text(json.dumps(every))
    return root


def request(zoo: Path, tmp_path: Path, weights: dict[str, float], base: str | None = "base", **more) -> MergeRequest:
    models = [{"model": str(zoo / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    document = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}} | more
    if base is not None:
        document["base_model"] = str(zoo / base)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document))
    return read_request(tmp_path / "merge.yml", tmp_path / "out")


def written(made: MergeRequest, num_threads: int = 1) -> tuple[dict[str, torch.Tensor], Vocabulary]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = made.write(WriteOptions(num_threads=num_threads)).path
    tensors, vocabulary = load_file(out / "model.safetensors"), AutoTokenizer.from_pretrained(out).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(out)  # the shapes are those of its config.json
    assert model.config.vocab_size == len(tensors[EMBEDDING]) >= len(vocabulary)
    return tensors, vocabulary


def rows(zoo: Path, name: str, tensor: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Of a checkpoint: by token its row."""
    vocabulary = json.loads((zoo / "vocabularies.json").read_text())[name]
    values = load_file(zoo / name / "model.safetensors")[tensor]
    return {token: values[number] for token, number in vocabulary.items() if number < len(values)}


def row(models: list[dict[str, torch.Tensor]], token: str, own: int, base: int | None) -> torch.Tensor:
    """The row of a token for the model `own`, by the rules one by one."""
    have = [one[token] for one in models if token in one]
    if token in models[own]:
        return models[own][token]
    if not have:
        return torch.zeros_like(next(iter(models[0].values())))
    if base is not None and token in models[base]:
        return models[base][token]
    return torch.stack(have).mean(dim=0)


CASES = [
    ({"base": 0.3, "added": 0.7}, "base", "union"),
    ({"base": 0.3, "code": 0.7}, "base", "union"),
    ({"base": 0.2, "code": 0.5, "french": 0.3}, "base", "union"),
    ({"code": 0.5, "french": 0.3, "added": 0.2}, None, "union"),  # "<tool>" and more are in two of three
    ({"base": 0.3, "reordered": 0.7}, "base", "union"),
    ({"base": 0.3, "reordered": 0.7}, "base", "reordered"),
    ({"base": 0.3, "code": 0.7}, "base", "base"),
    ({"base": 0.3, "code": 0.7}, "base", "code"),
    ({"base": 0.3, "padded": 0.7}, "base", "base"),
    ({"base": 0.3, "short": 0.7}, "base", "union"),
    ({"short": 0.3, "code": 0.7}, "short", "base"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_token_has_the_row_of_the_rules(zoo, tmp_path, monkeypatch, case):
    monkeypatch.setattr(kernels, "BLOCK", 37)  # blocks begin and end inside rows
    weights, base, source = CASES[case]
    is_word = source in ("union", "base")
    made = request(zoo, tmp_path, weights, base, tokenizer_source=source if is_word else str(zoo / source))
    tensors, vocabulary = written(made)
    names = list(weights)
    every = {token for name in names for token in rows(zoo, name)}
    wanted = every if source == "union" else set(rows(zoo, base if source == "base" else source))
    assert set(vocabulary) == wanted
    for tensor in (EMBEDDING, HEAD):
        models = [rows(zoo, name, tensor) for name in names]
        place = names.index(base) if base in names else None
        for token, number in vocabulary.items():
            parts = [weights[name] * row(models, token, own, place) for own, name in enumerate(names)]
            torch.testing.assert_close(tensors[tensor][number], sum(parts), rtol=1e-6, atol=1e-7, msg=token)


def test_ids_are_the_same_every_time_and_those_of_the_base_stay(zoo, tmp_path):
    files = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        graph = request(
            zoo, tmp_path / str(number), {"base": 1, "code": 1, "french": 1}, tokenizer_source="union"
        ).graph
        assert graph.tokenizer_files is not None
        files.append((graph.digest(), graph.tokenizer_files))
    assert files[0] == files[1]
    content = json.loads(files[0][1]["tokenizer.json"])
    base = json.loads((zoo / "base" / "tokenizer.json").read_text())
    assert content["model"] == base["model"]


RULES = {
    "<tool>": {"source": "added"},
    "<nothing>": {"source": {"kind": "zero"}},
    "<like>": {"source": {"kind": "model_token", "model": "code", "token": "<code>"}},
    "q": {"source": {"kind": "model_token", "model": "added", "token_id": 7}, "force": True},
}


def test_rules_of_tokens_and_padding(zoo, tmp_path):
    rules = yaml.safe_load(
        yaml.safe_dump(RULES).replace("added", str(zoo / "added")).replace("code\n", f"{zoo}/code\n")
    )
    weights = {"base": 0.2, "added": 0.3, "code": 0.5}
    tokenizer = {"source": "union", "tokens": rules, "pad_to_multiple_of": 64}
    made = request(zoo, tmp_path, weights, tokenizer=tokenizer)
    (tmp_path / "again.yml").write_text(made.graph.mergekit)
    tensors, vocabulary = written(made)
    found = tensors[EMBEDDING]
    assert len(found) % 64 == 0 and len(found) - len(vocabulary) in range(1, 64)
    models = {name: rows(zoo, name) for name in weights}
    seventh = load_file(zoo / "added" / "model.safetensors")[EMBEDDING][7]
    expected = {
        "<tool>": models["added"]["<tool>"],
        "<nothing>": torch.zeros(8),
        "<like>": models["code"]["<code>"],
        "q": seventh,
    }
    for token, value in expected.items():
        torch.testing.assert_close(found[vocabulary[token]], value, rtol=1e-6, atol=1e-7)
    means = [found[: len(vocabulary)].double().mean(dim=0).float()] * (len(found) - len(vocabulary))
    torch.testing.assert_close(found[len(vocabulary) :], torch.stack(means), rtol=1e-5, atol=1e-7)
    assert read_request(tmp_path / "again.yml", tmp_path / "other").graph.digest() == made.graph.digest()


def test_a_tied_bfloat16_merge_and_one_that_was_interrupted_have_the_same_bytes(zoo, tmp_path):
    weights = {"base-bf16": 0.4, "code-bf16": 0.6}
    made = request(zoo, tmp_path, weights, "base-bf16", tokenizer_source="union")
    assert not [output for output in made.graph.outputs if output.name == HEAD]
    bytes_ = (made.write(WriteOptions()).path / "model.safetensors").read_bytes()

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise Stopped

    again = MergeRequest(made.graph, tmp_path / "again")
    with pytest.raises(Stopped):
        again.write(WriteOptions(progress=stop, num_threads=1))
    result = again.write(WriteOptions())
    assert result.num_resumed and (result.path / "model.safetensors").read_bytes() == bytes_
    other = request(zoo, tmp_path, weights, "base-bf16", tokenizer={"source": "union", "pad_to_multiple_of": 7})
    assert other.graph.digest() != made.graph.digest()


def test_an_adapter_of_one_of_the_models_is_in_its_rows(zoo, tmp_path):
    from safetensors.numpy import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    down, up = torch.randn(2, 8).numpy(), torch.randn(len(rows(zoo, "code", HEAD)), 2).numpy()
    module = "base_model.model.lm_head"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = request(zoo, tmp_path, {"base": 0.0, f"code+{adapter}": 1.0}, tokenizer_source=str(zoo / "code"))
    tensors, vocabulary = written(made)
    number = json.loads((zoo / "vocabularies.json").read_text())["code"]["<code>"]
    change = torch.from_numpy(up[number] @ down)
    torch.testing.assert_close(tensors[HEAD][vocabulary["<code>"]], rows(zoo, "code", HEAD)["<code>"] + change)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"tokens": {"<x>": {}}}, "token '<x>' needs a source: not all models have it"),
        ({"tokens": {"<x>": {"source": "code"}}}, "it has no token '<x>'"),
        ({"tokens": {"<x>": {"source": "french"}}}, "is not merged; merged are"),
        ({"tokens": {"<x>": {"source": {"kind": "model_token", "model": "code", "token_id": 999}}}}, "row 999 of"),
        (
            {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "code"}}}},
            "exactly one of token and token_id",
        ),
        ({"tokens": {"<x>": {"source": {"kind": "mean"}}}}, "unknown kind 'mean'; known: zero, model_token"),
        ({"tokens": {"<x>": {"force": True}}}, "is missing; force needs it"),
        ({"pad_to_multiple_of": 0}, "a whole number above 0 is needed, got 0"),
    ],
)
def test_wrong_rules_are_refused_before_anything_is_written(zoo, tmp_path, tokenizer, message):
    text = yaml.safe_dump(tokenizer).replace("code\n", f"{zoo}/code\n").replace("french\n", f"{zoo}/french\n")
    with pytest.raises(InputError, match=message):
        request(zoo, tmp_path, {"base": 1, "code": 1}, tokenizer=yaml.safe_load(text.replace("code,", f"{zoo}/code,")))
    assert not (tmp_path / "out").exists()


def test_chat_templates_by_name_file_text_and_commonest(zoo, tmp_path):
    from transformers import AutoTokenizer

    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]

    def rendered(template: str, **more) -> str:
        (tmp_path / "here.jinja").write_text("file: {{ messages[0].content }}")
        out = request(zoo, tmp_path, {"base": 1, "code": 1}, chat_template=template, **more)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out.write(WriteOptions(num_threads=1))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    union = {"tokenizer_source": "union"}
    assert rendered("chatml", **union).endswith("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n")
    assert rendered("here.jinja", **union) == "file: Hi"
    assert rendered("{{ messages[1].content }}!", **union) == "Yo!"
    shutil.copytree(zoo, tmp_path / "zoo")
    for name, text in (("base", "one"), ("code", "two"), ("french", "two")):
        (tmp_path / "zoo" / name / "chat_template.jinja").write_text(f"{text} {{{{ messages[0].content }}}}")
    made = request(
        tmp_path / "zoo", tmp_path, {"base": 1, "code": 1, "french": 1}, chat_template="auto", tokenizer_source="union"
    )
    assert made.graph.tokenizer_files["chat_template.jinja"].startswith(b"two ")
    with pytest.raises(InputError, match="chat_template: 'chatlm' is no file"):
        request(zoo, tmp_path, {"base": 1, "code": 1}, chat_template="chatlm")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not UTF-8 text"),
        ("tokenizer_config.json", b"[" * 5000, "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "holds list, a JSON object is needed"),
    ],
)
def test_a_damaged_template_is_named(zoo, tmp_path, file, content, message):
    copy = tmp_path / "zoo"
    for name in ("base", "twin"):
        shutil.copytree(zoo / "base", copy / name)
        (copy / name / "chat_template.jinja").unlink(missing_ok=True)
    (copy / "twin" / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        request(copy, tmp_path, {"base": 1, "twin": 1}, chat_template="auto")


def test_a_template_for_a_tokenizer_that_is_copied(catalogue_path, tmp_path):
    models = [{"model": str(catalogue_path.parent / name), "parameters": {"weight": 1}} for name in ("m0", "m1")]
    document = {"merge_method": "linear", "models": models, "chat_template": "chatml"}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document))
    out = read_request(tmp_path / "merge.yml", tmp_path / "out").write(WriteOptions(num_threads=1)).path
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    assert (out / "tokenizer.json").read_bytes() == (catalogue_path.parent / "m0" / "tokenizer.json").read_bytes()


def test_a_file_of_several_documents_keeps_one_vocabulary(zoo, tmp_path):
    inner = {
        "name": "inner",
        "merge_method": "linear",
        "models": [{"model": str(zoo / "base"), "parameters": {"weight": 1}}],
    }
    outer = inner | {
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("inner", str(zoo / "code"))],
        "tokenizer_source": "union",
    }
    del outer["name"]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump_all([inner, outer]))
    with pytest.raises(InputError, match="for different vocabularies give tokenizer_source"):
        read_request(tmp_path / "merge.yml", tmp_path / "out")
