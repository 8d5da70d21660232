"""Families of the decoder-only graph with rotary attention: what each one's class fixes, and what its config.json sets.

Each `read_` function raises ConfigurationError, naming the key, for what the graph cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import read_activation
from trivium.executor.models.decoder_config import (
    BlockNames,
    DecoderConfig,
    HeadNormKind,
    LayerConfig,
    MoeConfig,
    NormKind,
    QkvLayout,
    TensorNames,
)
from trivium.executor.models.rope import RopeDefaults, read_rotary

SLIDING, FULL = "sliding_attention", "full_attention"
_LLAMA_NAMES = TensorNames()
_NO_CHOICE = RopeDefaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Of the config class, for keys that a config.json may leave out. None: num_heads, or hidden_size / num_heads."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    norm_eps: float = 1e-6
    tied: bool = False
    activation: str = "silu"
    rope: RopeDefaults = _NO_CHOICE


def read_llama(config: JsonConfig) -> DecoderConfig:
    bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    return read_decoder(config, Defaults(), qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def read_mistral(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(intermediate_size=14336, max_positions=131072, num_kv_heads=8)
    decoder = read_decoder(config, defaults)
    return with_window(decoder, config.optional_integer("sliding_window", 4096))


_QWEN = Defaults(vocab_size=151936, intermediate_size=22016, max_positions=32768, num_kv_heads=32)


def read_qwen2(config: JsonConfig) -> DecoderConfig:
    return _with_qwen_windows(config, read_decoder(config, _QWEN, qkv_bias=True))


def read_qwen3(config: JsonConfig) -> DecoderConfig:
    bias = config.boolean("attention_bias", False)
    decoder = read_decoder(
        config, replace(_QWEN, head_dim=128), qkv_bias=bias, output_bias=bias, head_norm=HeadNormKind.PER_HEAD
    )
    return _with_qwen_windows(config, decoder)


def _with_qwen_windows(config: JsonConfig, decoder: DecoderConfig) -> DecoderConfig:
    window = _qwen_window(config)
    first = config.integer("max_window_layers", 28)
    kinds = [SLIDING if window and index >= first else FULL for index in range(len(decoder.layers))]
    return with_layer_types(config, decoder, kinds, window)


def _qwen_window(config: JsonConfig) -> int | None:
    return config.optional_integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None


def read_mixtral(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(
        intermediate_size=14336,
        max_positions=131072,
        num_kv_heads=8,
        norm_eps=1e-5,
        rope=RopeDefaults(theta=1e6),
    )
    decoder = read_decoder(config, defaults)
    moe = MoeConfig(
        num_experts=_num_experts(config, "num_local_experts", "num_experts", 8),
        num_experts_per_token=config.positive_integer("num_experts_per_tok", 2),
        intermediate_size=decoder.intermediate_size,
        normalized=True,
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        expert_parts=("w1", "w3", "w2"),
    )
    decoder = replace(decoder, layers=tuple(replace(layer, moe=check_moe(config, moe)) for layer in decoder.layers))
    return with_window(decoder, config.optional_integer("sliding_window"))


def read_qwen2_moe(config: JsonConfig) -> DecoderConfig:
    defaults = replace(_QWEN, hidden_size=2048, intermediate_size=5632, num_layers=24, num_heads=16, num_kv_heads=16)
    decoder = read_decoder(config, defaults, qkv_bias=config.boolean("qkv_bias", True))
    num_experts, shared_size = 60, config.positive_integer("shared_expert_intermediate_size", 5632)
    decoder = _with_qwen_experts(config, decoder, num_experts, 4, 1408, shared_size=shared_size)
    window, last = _qwen_window(config), config.integer("max_window_layers", 28)
    kinds = [SLIDING if window and index % 2 == 0 and index < last else FULL for index in range(len(decoder.layers))]
    return with_layer_types(config, decoder, kinds, window)


def read_qwen3_moe(config: JsonConfig) -> DecoderConfig:
    bias = config.boolean("attention_bias", False)
    defaults = replace(_QWEN, hidden_size=2048, intermediate_size=6144, num_layers=24, num_kv_heads=4)
    decoder = read_decoder(config, defaults, qkv_bias=bias, output_bias=bias, head_norm=HeadNormKind.PER_HEAD)
    return with_window(_with_qwen_experts(config, decoder, 128, 8, 768), _qwen_window(config))


def _with_qwen_experts(
    config: JsonConfig,
    decoder: DecoderConfig,
    num_experts: int,
    num_experts_per_token: int,
    intermediate_size: int,
    *,
    shared_size: int = 0,
) -> DecoderConfig:
    """Experts in each `decoder_sparse_step`-th layer that `mlp_only_layers` does not name. The numbers are defaults."""
    num_experts = _num_experts(config, "num_experts", "num_local_experts", num_experts)
    step, dense = config.positive_integer("decoder_sparse_step", 1), config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigurationError(f"{config.file}: mlp_only_layers must be a list of layers, got {dense!r:.60}")
    if num_experts == 0:
        return decoder
    moe = MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=config.positive_integer("num_experts_per_tok", num_experts_per_token),
        intermediate_size=config.positive_integer("moe_intermediate_size", intermediate_size),
        normalized=config.boolean("norm_topk_prob", False),
        shared_size=shared_size,
    )
    check_moe(config, moe)
    layers = tuple(
        replace(layer, moe=moe) if index not in dense and (index + 1) % step == 0 else layer
        for index, layer in enumerate(decoder.layers)
    )
    return replace(decoder, layers=layers)


def read_phi3(config: JsonConfig) -> DecoderConfig:
    aliases = {"su": "longrope", "yarn": "longrope"}
    defaults = Defaults(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        max_positions=4096,
        norm_eps=1e-5,
        rope=RopeDefaults(partial=1.0, original_positions=4096, aliases=aliases),
    )
    names = TensorNames(qkv=("self_attn.qkv_proj",), qkv_layout=QkvLayout.STACKED, gate_up=("mlp.gate_up_proj",))
    return with_window(read_decoder(config, defaults, names=names), config.optional_integer("sliding_window"))


def read_olmo2(config: JsonConfig) -> DecoderConfig:
    bias = config.boolean("attention_bias", False)
    names = TensorNames(
        attention_norms=BlockNames(update="post_attention_layernorm"),
        mlp_norms=BlockNames(update="post_feedforward_layernorm"),
    )
    defaults = Defaults(vocab_size=50304, norm_eps=1e-5)
    return read_decoder(config, defaults, names=names, qkv_bias=bias, output_bias=bias, head_norm=HeadNormKind.FULL)


def read_granite(config: JsonConfig) -> DecoderConfig:
    bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    decoder = read_decoder(
        config,
        Defaults(),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logit_divisor=config.number("logits_scaling", 1.0),
    )
    scale = config.number("attention_multiplier", 1.0)
    return replace(decoder, layers=tuple(replace(layer, scale=scale) for layer in decoder.layers))


def read_smollm3(config: JsonConfig) -> DecoderConfig:
    """Layers without rotation; those are the ones with a window, where one is used."""
    defaults = Defaults(
        vocab_size=128256,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        max_positions=32768,
        tied=True,
        rope=RopeDefaults(theta=2e6),
    )
    bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    decoder = read_decoder(config, defaults, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
    num_layers = len(decoder.layers)
    interval = config.positive_integer("no_rope_layer_interval", 4)
    rotated = config.values.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers:
        raise ConfigurationError(f"{config.file}: no_rope_layers must name {num_layers} layers, got {rotated!r:.60}")
    uses_window = config.boolean("use_sliding_window", False)
    window = config.optional_integer("sliding_window") if uses_window else None
    kinds = [SLIDING if window and not is_rotated else FULL for is_rotated in rotated]
    decoder = with_layer_types(config, decoder, kinds, window)
    layers = zip(decoder.layers, rotated, strict=True)
    return replace(decoder, layers=tuple(replace(layer, rotary=0 if turns else None) for layer, turns in layers))


def read_starcoder2(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(
        vocab_size=49152,
        hidden_size=3072,
        intermediate_size=12288,
        num_layers=30,
        num_heads=24,
        num_kv_heads=2,
        max_positions=4096,
        norm_eps=1e-5,
        tied=True,
        activation="gelu_pytorch_tanh",
    )
    bias = config.boolean("use_bias", True)
    decoder = read_decoder(
        config,
        defaults,
        eps_key="norm_epsilon",
        names=TensorNames(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
        norm=NormKind.LAYER,
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )
    return with_window(decoder, config.optional_integer("sliding_window"))


def read_stablelm(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=6912,
        num_kv_heads=32,
        max_positions=4096,
        norm_eps=1e-5,
        rope=RopeDefaults(partial=0.25),
    )
    parallel = config.boolean("use_parallel_residual", False)
    return read_decoder(
        config,
        defaults,
        eps_key="layer_norm_eps",
        names=TensorNames(
            head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
            mlp_norms=BlockNames(enter=None if parallel else "post_attention_layernorm"),
        ),
        norm=NormKind.LAYER,
        parallel=parallel,
        qkv_bias=config.boolean("use_qkv_bias", False),
        head_norm=HeadNormKind.OWN_LAYER if config.boolean("qk_layernorm", False) else HeadNormKind.NONE,
    )


def read_decoder(
    config: JsonConfig,
    defaults: Defaults,
    *,
    eps_key: str = "rms_norm_eps",
    activation_key: str = "hidden_act",
    names: TensorNames = _LLAMA_NAMES,
    norm: NormKind = NormKind.RMS,
    **fields: Any,
) -> DecoderConfig:
    """The keys that all these families share; every layer has the same attention. `fields` win."""
    hidden_size = config.positive_integer("hidden_size", defaults.hidden_size)
    num_heads = config.positive_integer("num_attention_heads", defaults.num_heads)
    num_kv_heads = config.optional_integer("num_key_value_heads", defaults.num_kv_heads) or num_heads
    head_dim = config.positive_integer("head_dim", defaults.head_dim or hidden_size // num_heads)
    check_heads(config, num_heads, num_kv_heads)
    max_positions = config.positive_integer("max_position_embeddings", defaults.max_positions)
    if "rotaries" not in fields:
        rotary = read_rotary(config, head_dim, max_positions, defaults.rope)
        fields["rotaries"], max_positions = (rotary,), rotary.max_positions
    layer = LayerConfig(scale=head_dim**-0.5)
    return DecoderConfig(
        names=names,
        vocab_size=config.positive_integer("vocab_size", defaults.vocab_size),
        hidden_size=hidden_size,
        embedding_size=hidden_size,
        intermediate_size=config.positive_integer("intermediate_size", defaults.intermediate_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm=norm,
        norm_eps=config.number(eps_key, defaults.norm_eps),
        activation=read_activation(config, activation_key, defaults.activation),
        tied=config.boolean("tie_word_embeddings", defaults.tied),
        layers=(layer,) * config.positive_integer("num_hidden_layers", defaults.num_layers),
        **fields,
    )


def with_window(decoder: DecoderConfig, window: int | None) -> DecoderConfig:
    """The same window in every layer."""
    return replace(decoder, layers=tuple(replace(layer, window=window) for layer in decoder.layers))


def with_layer_types(
    config: JsonConfig, decoder: DecoderConfig, default: list[str], window: int | None
) -> DecoderConfig:
    """`layer_types` of the config, or `default`, says which layers have the window."""
    kinds = config.values.get("layer_types") or default
    if not isinstance(kinds, list) or len(kinds) != len(decoder.layers):
        raise ConfigurationError(
            f"{config.file}: layer_types must name {len(decoder.layers)} layers, got {kinds!r:.60}"
        )
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise ConfigurationError(f"{config.file}: layer_types {kind!r:.60} is not supported: {FULL}, {SLIDING}")
    layers = zip(decoder.layers, kinds, strict=True)
    return replace(
        decoder,
        layers=tuple(replace(layer, window=window if kind == SLIDING else None) for layer, kind in layers),
    )


def check_heads(config: JsonConfig, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigurationError(
            f"{config.file}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )


def check_moe(config: JsonConfig, moe: MoeConfig) -> MoeConfig:
    if moe.num_experts_per_token > moe.num_experts:
        raise ConfigurationError(
            f"{config.file}: num_experts_per_tok {moe.num_experts_per_token} is more than the {moe.num_experts} experts"
        )
    return moe


def refuse_other(config: JsonConfig, key: str, only: object) -> None:
    """Raise ConfigurationError if `key` is set to anything but `only`."""
    value = config.values.get(key)
    if value is not None and value != only:
        raise ConfigurationError(f"{config.file}: {key} {value!r:.60} is not supported, only {only!r}")


def _num_experts(config: JsonConfig, key: str, alias: str, default: int) -> int:
    values: Mapping[str, Any] = config.values
    return config.integer(alias if key not in values and alias in values else key, default)
