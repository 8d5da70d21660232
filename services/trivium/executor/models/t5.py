"""Encoder-decoder graph of T5: RMSNorm before each block, relative position biases, attention without a scale.

By configuration it is T5 (ReLU, tied and scaled output) or T5 v1.1 and Flan-T5 (gated GELU, an output of its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import activation_by_name
from trivium.executor.models.model import LanguageModel
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels

# Relative positions set no limit; `n_positions` says only what the model was trained with. This bounds what a request
# may ask for, and with it the arrays that are kept per request.
DEFAULT_MAX_LEN = 4096
_ATTENTION_SCALE = 1.0
_EMBEDDING_NAMES = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """max_distance: all distances from there on share one bias."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    ffn_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_buckets: int
    max_distance: int
    norm_eps: float
    activation: Activation
    gated: bool
    output_scale: float
    max_len: int

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Layer:
    """Weights of one layer; the cross-attention is None in the encoder. Its keys and values are the encoder's."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    cross_norm: Tensor | None
    cross_query: Linear | None
    cross_output: Linear | None
    ffn_norm: Tensor
    wide: Linear
    narrow: Linear


class T5Stack:
    """What both sides share: embedding, projections and feed-forward. bias_table: [num_heads, 2 * max_distance + 1]."""

    def __init__(
        self, config: T5Config, side: str, embedding: Tensor, checkpoint: Checkpoint, kernels: Kernels
    ) -> None:
        num_layers = config.num_encoder_layers if side == "encoder" else config.num_decoder_layers
        self.config = config
        self._kernels = kernels
        self._embedding = embedding
        self._final_norm = checkpoint.tensor(f"{side}.final_layer_norm.weight", config.hidden_size)
        buckets = checkpoint.tensor(
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", config.num_buckets, config.num_heads
        )
        self.bias_table = compact_bias_table(buckets, config.max_distance, bidirectional=side == "encoder")
        self.layers = tuple(_load_layer(config, side, checkpoint, index) for index in range(num_layers))

    def embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self._embedding)  # [num_tokens, hidden]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, weight, self.config.norm_eps)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x, self._final_norm)

    def project(self, layer: T5Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [num_tokens, num_heads, head_dim]."""
        qkv = layer.qkv(self.norm(hidden, layer.attention_norm))
        query, key, value = qkv.view(len(hidden), 3, self.config.num_heads, self.config.head_dim).unbind(1)
        return query, key, value

    def feed_forward(self, layer: T5Layer, hidden: Tensor) -> Tensor:
        wide = layer.wide(self.norm(hidden, layer.ffn_norm))
        activate = self._kernels.gated_activate if self.config.gated else self._kernels.activate
        return hidden + layer.narrow(activate(wide, self.config.activation))


class T5Encoder:
    """Encoder and the projection of its output to the cross-attention of all decoder layers. Weights only."""

    def __init__(self, stack: T5Stack, cross: Linear, kernels: Kernels) -> None:
        self._stack = stack
        self._cross = cross
        self._kernels = kernels

    def encode(self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        stack, config = self._stack, self._stack.config
        plan = self._kernels.plan_varlen_attention(cu_seqlens, causal=False, bias_table=stack.bias_table)
        hidden = stack.embed(token_ids)
        for layer in stack.layers:
            attended = self._kernels.varlen_attention(*stack.project(layer, hidden), plan, scale=_ATTENTION_SCALE)
            hidden = hidden + layer.output(attended.flatten(1))
            hidden = stack.feed_forward(layer, hidden)
        cross = self._cross(stack.final_norm(hidden))
        return cross.view(len(hidden), config.num_decoder_layers, 2, config.num_heads, config.head_dim)


class T5Decoder:
    """Weights only, immutable after construction."""

    def __init__(self, stack: T5Stack, head: Linear, kernels: Kernels) -> None:
        self._stack = stack
        self._head = head
        self._kernels = kernels

    def forward(self, token_ids: Tensor, positions: Tensor, kv_cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        stack = self._stack
        self_plan = metadata.plan_self(self._kernels, kv_cache.block_size, bias_table=stack.bias_table)
        cross_plan = metadata.plan_cross(self._kernels, kv_cache.block_size)
        hidden = stack.embed(token_ids)  # [num_tokens, hidden]
        for index, layer in enumerate(stack.layers):
            assert layer.cross_norm is not None and layer.cross_query and layer.cross_output, "no cross-attention"
            key_cache, value_cache = kv_cache.layer(index)
            query, key, value = stack.project(layer, hidden)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, self_plan, scale=_ATTENTION_SCALE)
            hidden = hidden + layer.output(attended.flatten(1))
            query = layer.cross_query(stack.norm(hidden, layer.cross_norm)).view_as(query)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, cross_plan, scale=_ATTENTION_SCALE)
            hidden = hidden + layer.cross_output(attended.flatten(1))
            hidden = stack.feed_forward(layer, hidden)
        return stack.final_norm(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden * self._stack.config.output_scale)


def compact_bias_table(buckets: Tensor, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Bias of each distance -max_distance .. max_distance (key minus query): [num_heads, 2 * max_distance + 1].

    buckets: [num_buckets, num_heads]. Exact for every distance, because all from `max_distance` on share a bucket.
    Near distances have a bucket each, farther ones share them logarithmically (https://arxiv.org/abs/1910.10683, 2.1).
    A decoder never looks ahead, so its positive half is never read.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    num_buckets = len(buckets) // 2 if bidirectional else len(buckets)
    offset = (distance > 0).long() * num_buckets if bidirectional else torch.zeros_like(distance)
    distance = distance.abs() if bidirectional else distance.clamp(max=0).neg()
    num_exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (ratio * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return buckets[offset + torch.where(distance < num_exact, distance, far)].T.contiguous()


def build_t5(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    settings = _read(config)
    embedding = checkpoint.tensor(checkpoint.first_of(_EMBEDDING_NAMES), settings.vocab_size, settings.hidden_size)
    encoder, decoder = (T5Stack(settings, side, embedding, checkpoint, kernels) for side in ("encoder", "decoder"))
    cross_names = [
        f"decoder.block.{index}.layer.1.EncDecAttention.{name}"
        for index in range(settings.num_decoder_layers)
        for name in "kv"
    ]
    widths = (settings.inner_size,) * len(cross_names)
    cross = checkpoint.linear(cross_names, widths, settings.hidden_size, bias=False)
    head = Linear(checkpoint.output_weight("lm_head.weight", embedding, tied=True))
    return LanguageModel(
        decoder=T5Decoder(decoder, head, kernels),
        encoder=T5Encoder(encoder, cross, kernels),
        kv_shape=KVCacheShape(settings.num_decoder_layers, settings.num_heads, settings.head_dim),
        vocab_size=settings.vocab_size,
        max_model_len=settings.max_len,
        max_encoder_len=settings.max_len,
    )


def _read(config: JsonConfig) -> T5Config:
    projection = config.string("feed_forward_proj", "relu")
    gate, _, name = projection.rpartition("-")
    if gate not in ("", "gated"):
        raise ConfigurationError(f"{config.file}: feed_forward_proj {projection!r} is not supported")
    if projection == "gated-gelu":
        name = "gelu_new"  # what the name has meant since T5 v1.1
    num_layers, hidden_size = config.integer("num_layers", 6), config.integer("d_model", 512)
    # Original T5 scales the output and ties it. Later checkpoints say which they are by `tie_word_embeddings`, and by
    # a key of its own since transformers 5.
    scaled = config.boolean("scale_decoder_outputs", config.boolean("tie_word_embeddings", True))
    return T5Config(
        vocab_size=config.integer("vocab_size", 32128),
        hidden_size=hidden_size,
        head_dim=config.integer("d_kv", 64),
        num_heads=config.integer("num_heads", 8),
        ffn_size=config.integer("d_ff", 2048),
        num_encoder_layers=num_layers,
        num_decoder_layers=config.integer("num_decoder_layers", num_layers),
        num_buckets=config.integer("relative_attention_num_buckets", 32),
        max_distance=config.integer("relative_attention_max_distance", 128),
        norm_eps=config.number("layer_norm_epsilon", 1e-6),
        activation=activation_by_name(name, config.file, "feed_forward_proj"),
        gated=gate == "gated",
        output_scale=hidden_size**-0.5 if scaled else 1.0,
        max_len=max(config.integer("n_positions", 512), DEFAULT_MAX_LEN),
    )


def _load_layer(config: T5Config, side: str, checkpoint: Checkpoint, index: int) -> T5Layer:
    block, hidden, inner = f"{side}.block.{index}.layer", config.hidden_size, config.inner_size
    has_cross = side == "decoder"
    ffn = f"{block}.{2 if has_cross else 1}"
    wide_names = [f"{ffn}.DenseReluDense.{name}" for name in (("wi_0", "wi_1") if config.gated else ("wi",))]
    wide_widths = (config.ffn_size,) * len(wide_names)

    def linear(name: str, width: int, in_features: int) -> Linear:
        return checkpoint.linear([name], (width,), in_features, bias=False)

    return T5Layer(
        attention_norm=checkpoint.tensor(f"{block}.0.layer_norm.weight", hidden),
        qkv=checkpoint.linear([f"{block}.0.SelfAttention.{name}" for name in "qkv"], (inner,) * 3, hidden, bias=False),
        output=linear(f"{block}.0.SelfAttention.o", hidden, inner),
        cross_norm=checkpoint.tensor(f"{block}.1.layer_norm.weight", hidden) if has_cross else None,
        cross_query=linear(f"{block}.1.EncDecAttention.q", inner, hidden) if has_cross else None,
        cross_output=linear(f"{block}.1.EncDecAttention.o", hidden, inner) if has_cross else None,
        ffn_norm=checkpoint.tensor(f"{ffn}.layer_norm.weight", hidden),
        wide=checkpoint.linear(wide_names, wide_widths, hidden, bias=False),
        narrow=linear(f"{ffn}.DenseReluDense.wo", hidden, config.ffn_size),
    )
