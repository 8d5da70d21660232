"""Tiny random checkpoints of every family, made with transformers, and a byte tokenizer beside them.

The weights are larger than a fresh initialisation: with the default scale all logits are nearly equal, and greedy
decoding would depend on rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from tiny_decoders import DECODER_BUILDERS, flip_final_norm

PAD, BOS, EOS, UNK = 0, 1, 2, 3
NUM_SPECIAL = 4  # the byte b is token NUM_SPECIAL + rank of b in the byte alphabet
VOCAB_SIZE = NUM_SPECIAL + 256
MAX_POSITIONS = 128

DECODER_ONLY = ("llama", "mistral", "qwen2", "qwen3")
ENCODER_DECODER = ("bart", "t5", "t5_gated")
FAMILIES = DECODER_ONLY + ENCODER_DECODER  # those that every test of whole requests runs with
BART_LIKE = ("bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "blenderbot_small")
T5_LIKE = ("t5", "t5_gated", "mt5", "umt5")

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": MAX_POSITIONS,
    "init_std": 0.3,
    "scale_embedding": True,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": EOS,
    **_IDS,
}
_T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "initializer_factor": 1.0,
    "decoder_start_token_id": PAD,
    **_IDS,
}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu"}

# family -> (class, class of its config, the config)
_BUILDERS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    **DECODER_BUILDERS,
    "bart": (BartForConditionalGeneration, BartConfig, _BART),
    "mbart": (MBartForConditionalGeneration, MBartConfig, _BART),
    "marian": (MarianMTModel, MarianConfig, {**_BART, "decoder_start_token_id": PAD, "activation_function": "swish"}),
    "pegasus": (
        PegasusForConditionalGeneration,
        PegasusConfig,
        {**_BART, "decoder_start_token_id": PAD, "activation_function": "relu"},
    ),
    "m2m_100": (M2M100ForConditionalGeneration, M2M100Config, _BART),
    "blenderbot": (
        BlenderbotForConditionalGeneration,
        BlenderbotConfig,
        {**_BART, "decoder_start_token_id": BOS, "encoder_no_repeat_ngram_size": 0},
    ),
    "blenderbot_small": (
        BlenderbotSmallForConditionalGeneration,
        BlenderbotSmallConfig,
        {**_BART, "decoder_start_token_id": BOS},
    ),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "t5_gated": (T5ForConditionalGeneration, T5Config, _GATED),
    "mt5": (MT5ForConditionalGeneration, MT5Config, _GATED),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, _GATED),
}
_OWN_HEAD = ("t5_gated", "mt5", "umt5")  # published checkpoints have an output of their own
_FORCES_BOS = ("bart", "mbart", "m2m_100")


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of `family` in evaluation mode; `overrides` go to its config."""
    torch.manual_seed(seed)
    model = _build(family, overrides).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # sinusoids do not
                _unsettle(name, parameter)
        flip_final_norm(family, model)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(0.3 * torch.randn_like(model.final_logits_bias))
    if family in _FORCES_BOS:
        model.generation_config.forced_bos_token_id = BOS
    return model


def save_tiny(family: str, path: Path, seed: int = 0, *, with_tokenizer: bool = False, **overrides: Any) -> Path:
    """Write a tiny checkpoint of `family` to the directory `path`, and return it."""
    save_model(tiny_model(family, seed, **overrides), path)
    if with_tokenizer:
        with _quiet():
            tiny_tokenizer(adds_eos=family in BART_LIKE + T5_LIKE).save_pretrained(path)
    return path


def save_model(model: PreTrainedModel, path: Path) -> Path:
    """Write a checkpoint of `model` to the directory `path`, and return it."""
    with _quiet():
        model.save_pretrained(path)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars, and without warnings that a tiny model is not a real one."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_oracle(path: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    is_encoder_decoder = AutoConfig.from_pretrained(path).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def tiny_tokenizer(*, adds_eos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, after the four special ones. Encoder inputs end with EOS, decoder-only prompts do not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _build(family: str, overrides: dict[str, Any]) -> PreTrainedModel:
    if family not in _BUILDERS:
        raise ValueError(f"unknown family {family!r}: {', '.join(_BUILDERS)}")
    kind, config_kind, settings = _BUILDERS[family]
    config = config_kind(**{**settings, **overrides})
    if family == "t5_gated":
        config.scale_decoder_outputs = False
    model = kind(config)
    if family in _OWN_HEAD:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def _unsettle(name: str, parameter: torch.Tensor) -> None:
    """Move a parameter away from where a fresh model has it, so that a mix-up shows and greedy output varies.

    Norms and biases start as ones and zeros. A tied model repeats its last token unless attention and signed norms
    outweigh the residual; one with cross-attention ignores its own output unless that is held back.
    """
    if parameter.dim() == 1:
        parameter.add_((0.05 if name.endswith("bias") else 0.2) * torch.randn_like(parameter))
    if "relative_attention_bias" in name:
        parameter.copy_(torch.randn_like(parameter))
    elif name.endswith((".o.weight", ".wo.weight")):
        parameter.mul_(4.0)
    elif name.startswith("model.decoder") and name.endswith("norm.weight"):
        parameter.mul_(torch.randn_like(parameter).sign())
    elif "encoder_attn.out_proj.weight" in name:
        parameter.mul_(0.3)
    elif "embed_positions" in name:
        parameter.mul_(6.0)
    elif name == "model.shared.weight":
        parameter.copy_(1.5 * torch.nn.functional.normalize(parameter, dim=-1))
