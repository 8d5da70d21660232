"""Gemma 1, 2 and 3 (text) on the decoder-only graph: scaled embeddings, norms stored as differences from one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.decoder_config import (
    BlockNames,
    DecoderConfig,
    HeadNormKind,
    NormKind,
    TensorNames,
)
from trivium.executor.models.decoder_families import (
    FULL,
    SLIDING,
    Defaults,
    read_decoder,
    refuse_other,
    with_layer_types,
)
from trivium.executor.models.rope import RopeDefaults, read_rotary
from trivium_kernels.activation import Activation

_SANDWICH_NAMES = TensorNames(
    attention_norms=BlockNames(enter="input_layernorm", update="post_attention_layernorm"),
    mlp_norms=BlockNames(enter="pre_feedforward_layernorm", update="post_feedforward_layernorm"),
)


def read_gemma(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_layers=28,
        num_heads=16,
        num_kv_heads=16,
        head_dim=256,
        max_positions=8192,
        tied=True,
        activation="gelu_pytorch_tanh",
    )
    decoder = _read_gemma(config, defaults, activation_key="hidden_act")
    if config.values.get("hidden_act") == "gelu":  # what Gemma's authors wrote, and not what they ran
        return replace(decoder, activation=Activation.GELU_TANH)
    return decoder


_GEMMA2 = Defaults(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_positions=8192,
    tied=True,
    activation="gelu_pytorch_tanh",
)


def read_gemma2(config: JsonConfig) -> DecoderConfig:
    decoder = _read_gemma(
        config,
        _GEMMA2,
        names=_SANDWICH_NAMES,
        activation_key="hidden_activation",
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping", 50.0),
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping", 30.0),
    )
    kinds = [FULL if index % 2 else SLIDING for index in range(len(decoder.layers))]
    return _with_gemma_layers(config, decoder, kinds)


def read_gemma3(config: JsonConfig) -> DecoderConfig:
    """Sliding layers have a rotary base of their own. transformers reads `attn_logit_softcapping` and caps nothing."""
    refuse_other(config, "attn_logit_softcapping", None)
    defaults = replace(_GEMMA2, vocab_size=262208, max_positions=131072)
    decoder = _read_gemma(
        config,
        defaults,
        names=_SANDWICH_NAMES,
        activation_key="hidden_activation",
        head_norm=HeadNormKind.PER_HEAD,
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping", None),
        rotaries=(),
    )
    parameters = config.mapping("rope_parameters")
    full, sliding = (parameters.get(kind) or {} for kind in (FULL, SLIDING))
    full = {**full, **config.mapping("rope_scaling")}
    size, length = decoder.head_dim, decoder.max_positions
    rotaries = (
        read_rotary(config, size, length, RopeDefaults(theta=1e6), full),
        read_rotary(config, size, length, RopeDefaults(theta_key="rope_local_base_freq"), sliding),
    )
    pattern = config.positive_integer("sliding_window_pattern", 6)
    kinds = [SLIDING if (index + 1) % pattern else FULL for index in range(len(decoder.layers))]
    decoder = _with_gemma_layers(config, decoder, kinds)
    layers = tuple(replace(layer, rotary=0 if layer.window is None else 1) for layer in decoder.layers)
    max_positions = max(rotary.max_positions for rotary in rotaries)
    return replace(decoder, layers=layers, rotaries=rotaries, max_positions=max_positions)


def _read_gemma(config: JsonConfig, defaults: Defaults, **fields: Any) -> DecoderConfig:
    refuse_other(config, "use_bidirectional_attention", False)
    bias = config.boolean("attention_bias", False)
    decoder = read_decoder(config, defaults, norm=NormKind.RMS_PLUS_ONE, qkv_bias=bias, output_bias=bias, **fields)
    return replace(decoder, embedding_multiplier=math.sqrt(decoder.hidden_size), embeds_are_multiplied=True)


def _with_gemma_layers(config: JsonConfig, decoder: DecoderConfig, kinds: list[str]) -> DecoderConfig:
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    decoder = with_layer_types(config, decoder, kinds, config.positive_integer("sliding_window", 4096))
    return replace(decoder, layers=tuple(replace(layer, scale=scale) for layer in decoder.layers))


def _soft_cap(config: JsonConfig, key: str, default: float | None) -> float | None:
    value = config.values.get(key, default)
    if value is None:
        return None
    cap = config.number(key, default)
    if cap <= 0:
        raise ConfigurationError(f"{config.file}: {key} must be positive, got {cap}")
    return cap
