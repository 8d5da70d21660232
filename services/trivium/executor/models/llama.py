"""Decoder-only graph: pre-norm RMSNorm, rotary attention with grouped heads, gated feed-forward.

By configuration it is Llama, Mistral (sliding window), Qwen2 (biased QKV) or Qwen3 (normed queries and keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import read_activation
from trivium.executor.models.model import LanguageModel
from trivium.executor.models.rope import RotaryAngles, read_rotary_angles
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """windows[i] is the sliding window of layer i, None for full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: Activation
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rotary: RotaryAngles


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer; q_norm and k_norm are [head_dim] or None."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class LlamaDecoder:
    """Weights only, immutable after construction."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels) -> None:
        self._config = config
        self._kernels = kernels
        self._scale = config.head_dim**-0.5
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = tuple(_load_layer(config, checkpoint, index) for index in range(len(config.windows)))
        self._final_norm = checkpoint.tensor("model.norm.weight", config.hidden_size)
        self._head = Linear(checkpoint.output_weight("lm_head.weight", self._embedding, tied=config.tied))

    def forward(self, token_ids: Tensor, positions: Tensor, kv_cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        cos, sin = self._config.rotary.cos_sin(positions)
        plans = {
            window: metadata.plan_self(self._kernels, kv_cache.block_size, window=window)
            for window in set(self._config.windows)
        }
        hidden = F.embedding(token_ids, self._embedding)  # [num_tokens, hidden]
        for index, layer in enumerate(self._layers):
            normed = self._kernels.rms_norm(hidden, layer.input_norm, self._config.norm_eps)
            query, key, value = self._project(layer, normed, cos, sin)
            key_cache, value_cache = kv_cache.layer(index)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
            attended = self._kernels.paged_attention(
                query, key_cache, value_cache, plans[layer.window], scale=self._scale
            )  # [num_tokens, num_heads, head_dim]
            hidden = hidden + layer.output(attended.flatten(1))
            normed = self._kernels.rms_norm(hidden, layer.mlp_norm, self._config.norm_eps)
            gated = self._kernels.gated_activate(layer.gate_up(normed), self._config.activation)
            hidden = hidden + layer.down(gated)
        return self._kernels.rms_norm(hidden, self._final_norm, self._config.norm_eps)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _project(self, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key and plain value, each [num_tokens, heads, head_dim]."""
        config = self._config
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(x).view(x.shape[0], num_rotated + config.num_kv_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = self._kernels.rms_norm(qkv[:, : config.num_heads], layer.q_norm, config.norm_eps)
            key = self._kernels.rms_norm(qkv[:, config.num_heads : num_rotated], layer.k_norm, config.norm_eps)
            query = self._kernels.rotary_embedding(query, cos, sin)
            return query, self._kernels.rotary_embedding(key, cos, sin), qkv[:, num_rotated:]
        rotated = self._kernels.rotary_embedding(qkv[:, :num_rotated], cos, sin)
        return rotated[:, : config.num_heads], rotated[:, config.num_heads :], qkv[:, num_rotated:]


def build_llama(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    bias = config.boolean("attention_bias", False)
    window = (None,) * config.integer("num_hidden_layers", 32)
    defaults = {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
    mlp_bias = config.boolean("mlp_bias", False)
    return _build(
        _read(config, defaults, window, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias), checkpoint, kernels
    )


def build_mistral(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    window = (config.optional_integer("sliding_window", 4096),) * config.integer("num_hidden_layers", 32)
    defaults = {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    }
    return _build(_read(config, defaults, window), checkpoint, kernels)


def build_qwen2(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    return _build(_read(config, _QWEN_DEFAULTS, _qwen_windows(config), qkv_bias=True), checkpoint, kernels)


def build_qwen3(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    bias = config.boolean("attention_bias", False)
    defaults = {**_QWEN_DEFAULTS, "head_dim": 128}
    windows = _qwen_windows(config)
    return _build(_read(config, defaults, windows, qkv_bias=bias, output_bias=bias, qk_norm=True), checkpoint, kernels)


_QWEN_DEFAULTS: Mapping[str, int] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}


def _qwen_windows(config: JsonConfig) -> tuple[int | None, ...]:
    num_layers = config.integer("num_hidden_layers", 32)
    window = config.optional_integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    first = config.integer("max_window_layers", 28)
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigurationError(f"{config.file}: layer_types must name {num_layers} layers, got {kinds!r:.60}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read(
    config: JsonConfig,
    defaults: Mapping[str, int],
    windows: tuple[int | None, ...],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderConfig:
    """`defaults` are those of the architecture's transformers class for keys that a config.json may leave out."""
    hidden_size = config.integer("hidden_size", 4096)
    num_heads = config.integer("num_attention_heads", 32)
    head_dim = config.integer("head_dim", defaults.get("head_dim", hidden_size // num_heads))
    max_positions = config.integer("max_position_embeddings", defaults["max_position_embeddings"])
    return DecoderConfig(
        vocab_size=config.integer("vocab_size", defaults["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", defaults["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=config.optional_integer("num_key_value_heads", defaults.get("num_key_value_heads")) or num_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=read_activation(config, "hidden_act", "silu"),
        tied=config.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows,
        rotary=read_rotary_angles(config, head_dim, max_positions),
    )


def _build(config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    return LanguageModel(
        decoder=LlamaDecoder(config, checkpoint, kernels),
        encoder=None,
        kv_shape=KVCacheShape(len(config.windows), config.num_kv_heads, config.head_dim),
        vocab_size=config.vocab_size,
        max_model_len=config.max_positions,
        max_encoder_len=0,
    )


def _load_layer(config: DecoderConfig, checkpoint: Checkpoint, index: int) -> DecoderLayer:
    layer, attention, mlp = (f"model.layers.{index}{part}" for part in ("", ".self_attn", ".mlp"))
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    return DecoderLayer(
        input_norm=checkpoint.tensor(f"{layer}.input_layernorm.weight", hidden),
        qkv=checkpoint.linear(
            [f"{attention}.{name}_proj" for name in "qkv"], (q_width, kv_width, kv_width), hidden, bias=config.qkv_bias
        ),
        q_norm=checkpoint.tensor(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
        k_norm=checkpoint.tensor(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
        output=checkpoint.linear([f"{attention}.o_proj"], (hidden,), q_width, bias=config.output_bias),
        mlp_norm=checkpoint.tensor(f"{layer}.post_attention_layernorm.weight", hidden),
        gate_up=checkpoint.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], (wide, wide), hidden, bias=config.mlp_bias),
        down=checkpoint.linear([f"{mlp}.down_proj"], (hidden,), wide, bias=config.mlp_bias),
        window=config.windows[index],
    )
