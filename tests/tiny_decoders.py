"""Tiny configurations of the decoder-only families, as `tiny` builds them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

SLIDING_WINDOW = 7
VOCAB_SIZE = 260

_DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA = {**_DECODER, "head_dim": 12}
_GEMMA23 = {**_GEMMA, "num_hidden_layers": 3, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 20}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_GPT2 = {_GPT2_KEYS.get(key, key): value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_OPT = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "initializer_range")}
_OPT |= {"ffn_dim": _OPT.pop("intermediate_size"), "init_std": 0.3}
_FALCON = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "intermediate_size")}

# family -> (class, class of its config, the config)
DECODER_BUILDERS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _DECODER),
    "mistral": (MistralForCausalLM, MistralConfig, {**_DECODER, "sliding_window": SLIDING_WINDOW}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {**_DECODER, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_DECODER, "tie_word_embeddings": True}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 40},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_DECODER, "head_dim": 16}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_DECODER, **_EXPERTS, "head_dim": 16}),
    "gemma": (GemmaForCausalLM, GemmaConfig, _GEMMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GEMMA23),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA23),
    "phi3": (Phi3ForCausalLM, Phi3Config, {**_DECODER, "original_max_position_embeddings": 128}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _DECODER),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {
            **_DECODER,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.6,
        },
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {**_DECODER, "no_rope_layer_interval": 2}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, _DECODER),
    "stablelm": (StableLmForCausalLM, StableLmConfig, {**_DECODER, "partial_rotary_factor": 0.5}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "opt": (OPTForCausalLM, OPTConfig, _OPT),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**_FALCON, "intermediate_size": 56, "rotary_pct": 0.5}),
    "falcon": (FalconForCausalLM, FalconConfig, _FALCON),
}


# Families whose output is tied to their embedding: (name of the final norm, what its stored weight is added to).
_FINAL_NORMS = {
    "gemma": ("model.norm", 1),
    "gemma2": ("model.norm", 1),
    "gemma3": ("model.norm", 1),
    "smollm3": ("model.norm", 0),
    "starcoder2": ("model.norm", 0),
    "gpt2": ("transformer.ln_f", 0),
    "falcon": ("transformer.ln_f", 0),
}


def flip_final_norm(family: str, model: PreTrainedModel) -> None:
    """Give the final norm of a tied model random signs, or its likeliest token is the one that it has just read."""
    if family in _FINAL_NORMS:
        name, offset = _FINAL_NORMS[family]
        weight = model.get_submodule(name).weight
        weight.copy_((weight + offset) * torch.randn_like(weight).sign() - offset)
