"""Families of the decoder-only graph that came before Llama, each with its own names: GPT-2, OPT, GPT-NeoX, Falcon."""

from __future__ import annotations

from dataclasses import replace

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import read_activation
from trivium.executor.models.decoder_config import (
    BlockNames,
    DecoderConfig,
    LayerConfig,
    NormKind,
    QkvLayout,
    TensorNames,
)
from trivium.executor.models.decoder_families import Defaults, check_heads, read_decoder, refuse_other
from trivium.executor.models.rope import RopeDefaults, read_rotary

_GPT2_NAMES = TensorNames(
    prefix="transformer",
    embedding="wte",
    positions="wpe",
    layers="h",
    final_norm="ln_f",
    qkv=("attn.c_attn",),
    qkv_layout=QkvLayout.STACKED,
    output="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_norms=BlockNames(enter="ln_1"),
    mlp_norms=BlockNames(enter="ln_2"),
    conv1d=True,
)
_OPT_NAMES = TensorNames(
    prefix="model.decoder",
    positions="embed_positions",
    final_norm="final_layer_norm",
    output="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
    attention_norms=BlockNames(enter="self_attn_layer_norm"),
    mlp_norms=BlockNames(enter="final_layer_norm"),
)
_NEOX_NAMES = TensorNames(
    prefix="gpt_neox",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head=("lm_head", "embed_out"),
    qkv=("attention.query_key_value",),
    qkv_layout=QkvLayout.GROUPED,
    output="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_FALCON_NAMES = TensorNames(
    prefix="transformer",
    embedding="word_embeddings",
    layers="h",
    final_norm="ln_f",
    qkv=("self_attention.query_key_value",),
    qkv_layout=QkvLayout.GROUPED,
    output="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)


def read_gpt2(config: JsonConfig) -> DecoderConfig:
    refuse_other(config, "add_cross_attention", False)
    hidden_size = config.positive_integer("n_embd", 768)
    num_heads = config.positive_integer("n_head", 12)
    scale = _head_dim(config, "n_embd", "n_head", hidden_size, num_heads) ** -0.5
    scale = scale if config.boolean("scale_attn_weights", True) else 1.0
    by_layer = config.boolean("scale_attn_by_inverse_layer_idx", False)
    return DecoderConfig(
        names=_GPT2_NAMES,
        vocab_size=config.positive_integer("vocab_size", 50257),
        hidden_size=hidden_size,
        embedding_size=hidden_size,
        intermediate_size=config.positive_integer("n_inner", 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=config.positive_integer("n_positions", 1024),
        norm=NormKind.LAYER,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=read_activation(config, "activation_function", "gelu_new"),
        tied=config.boolean("tie_word_embeddings", True),
        layers=tuple(
            LayerConfig(scale=scale / (index + 1) if by_layer else scale, rotary=None)
            for index in range(config.positive_integer("n_layer", 12))
        ),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def read_opt(config: JsonConfig) -> DecoderConfig:
    hidden_size = config.positive_integer("hidden_size", 768)
    num_heads = config.positive_integer("num_attention_heads", 12)
    head_dim = _head_dim(config, "hidden_size", "num_attention_heads", hidden_size, num_heads)
    embedding_size = config.positive_integer("word_embed_proj_dim", hidden_size)
    names, bias = _OPT_NAMES, config.boolean("enable_bias", True)
    if not config.boolean("do_layer_norm_before", True):
        names = replace(
            names,
            final_norm=None,
            attention_norms=BlockNames(leave="self_attn_layer_norm"),
            mlp_norms=BlockNames(leave="final_layer_norm"),
        )
    if config.boolean("_remove_final_layer_norm", False):
        names = replace(names, final_norm=None)
    if embedding_size != hidden_size:
        names = replace(names, project_in="project_in", project_out="project_out")
    has_weights = config.boolean("layer_norm_elementwise_affine", True)
    return DecoderConfig(
        names=names,
        vocab_size=config.positive_integer("vocab_size", 50272),
        hidden_size=hidden_size,
        embedding_size=embedding_size,
        intermediate_size=config.positive_integer("ffn_dim", 3072),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_positions=config.positive_integer("max_position_embeddings", 2048),
        norm=NormKind.LAYER if has_weights else NormKind.PLAIN_LAYER,
        norm_eps=1e-5,
        activation=read_activation(config, "activation_function", "relu"),
        tied=config.boolean("tie_word_embeddings", True),
        layers=(LayerConfig(scale=head_dim**-0.5, rotary=None),) * config.positive_integer("num_hidden_layers", 12),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        position_offset=2,
    )


def read_gpt_neox(config: JsonConfig) -> DecoderConfig:
    defaults = Defaults(
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_layers=44,
        num_heads=64,
        norm_eps=1e-5,
        activation="gelu",
        rope=RopeDefaults(theta_key="rotary_emb_base", partial_key="rotary_pct", partial=0.25),
    )
    bias = config.boolean("attention_bias", True)
    return read_decoder(
        config,
        defaults,
        eps_key="layer_norm_eps",
        names=_NEOX_NAMES,
        norm=NormKind.LAYER,
        gated=False,
        parallel=config.boolean("use_parallel_residual", True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )


def read_falcon(config: JsonConfig) -> DecoderConfig:
    refuse_other(config, "alibi", False)
    hidden_size = config.positive_integer("n_embed", config.positive_integer("hidden_size", 4544))
    num_heads = config.positive_integer("num_attention_heads", 71)
    head_dim = _head_dim(config, "hidden_size", "num_attention_heads", hidden_size, num_heads)
    num_kv_heads = _falcon_kv_heads(config, num_heads)
    rotary = read_rotary(config, head_dim, config.positive_integer("max_position_embeddings", 2048), RopeDefaults())
    parallel, bias = config.boolean("parallel_attn", True), config.boolean("bias", False)
    attention_norms, mlp_norms = _falcon_norms(config, parallel=parallel)
    return DecoderConfig(
        names=replace(_FALCON_NAMES, attention_norms=attention_norms, mlp_norms=mlp_norms),
        vocab_size=config.positive_integer("vocab_size", 65024),
        hidden_size=hidden_size,
        embedding_size=hidden_size,
        intermediate_size=config.positive_integer("ffn_hidden_size", 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=rotary.max_positions,
        norm=NormKind.LAYER,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=read_activation(config, "activation", "gelu"),
        tied=config.boolean("tie_word_embeddings", True),
        layers=(LayerConfig(scale=head_dim**-0.5),) * config.positive_integer("num_hidden_layers", 32),
        rotaries=(rotary,),
        gated=False,
        parallel=parallel,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def _falcon_kv_heads(config: JsonConfig, num_heads: int) -> int:
    if config.boolean("new_decoder_architecture", False):
        num_kv_heads = config.positive_integer("num_kv_heads", num_heads)
        check_heads(config, num_heads, num_kv_heads)
        return num_kv_heads
    return 1 if config.boolean("multi_query", True) else num_heads


def _falcon_norms(config: JsonConfig, *, parallel: bool) -> tuple[BlockNames, BlockNames]:
    """(of attention, of feed-forward). A parallel feed-forward without a norm of its own sees what attention sees."""
    is_new = config.boolean("new_decoder_architecture", False)
    num_norms = config.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    if not parallel:
        if is_new:
            raise ConfigurationError(
                f"{config.file}: parallel_attn false with new_decoder_architecture is not supported"
            )
        return BlockNames(enter="input_layernorm"), BlockNames(enter="post_attention_layernorm")
    if num_norms == 2 and is_new:
        return BlockNames(enter="ln_attn"), BlockNames(enter="ln_mlp")
    if num_norms != 1:
        raise ConfigurationError(f"{config.file}: num_ln_in_parallel_attn {num_norms} is not supported here, only 1")
    return BlockNames(enter="input_layernorm"), BlockNames()


def _head_dim(config: JsonConfig, size_key: str, heads_key: str, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ConfigurationError(
            f"{config.file}: {size_key} {hidden_size} is not a multiple of {heads_key} {num_heads}"
        )
    return hidden_size // num_heads
