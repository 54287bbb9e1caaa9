"""The demo's tokenizer and model: one token per character, and a Llama of about a third of a million parameters."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
ACCENTED = "áâãäçéêëíîïñóôõöúûüýąćęłńśźżàèìòùÁÂÄÇÉÍÎÑÓÖÚÜŁŚŻ"
ALPHABET = "\n " + string.digits + string.ascii_letters + string.punctuation + ACCENTED
MAX_POSITIONS = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, a beginning-of-sequence token in front: the same ids in training and in evaluation."""
    vocabulary = {token: i for i, token in enumerate((PAD, BOS, EOS, UNK, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, num_layers: int = 3, hidden_size: int = 96, intermediate_size: int = 256
) -> LlamaForCausalLM:
    """A randomly initialised Llama (from torch's global generator) with heads of 32 and tied embeddings."""
    tokens = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        **tokens,
    )
    return LlamaForCausalLM(config)
