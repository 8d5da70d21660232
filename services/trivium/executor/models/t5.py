"""Encoder-decoder graph of T5: RMSNorm before each block, relative position biases, attention without a scale.

By configuration it is T5, ByT5 or MADLAD (ReLU, tied and scaled output), T5 v1.1 or Flan-T5 (gated GELU, an output of
its own), mT5 or UMT5 (biases for every layer); see `t5_families`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear, Product
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.model import InputEmbeds, LanguageModel
from trivium.executor.models.t5_families import T5Config, T5Family, read_t5_config
from trivium.executor.parallel.shard import as_slice
from trivium_kernels.dispatch import Kernels

_ATTENTION_SCALE = 1.0
_HEAD = "lm_head.weight"
_HEADS, _WIDTH = "attention heads", "feed-forward columns"  # what is split, in an error
_SHARED_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Layer:
    """Weights of one layer; the cross-attention is None in the encoder. Its keys and values are the encoder's."""

    attention_norm: Tensor
    qkv: Linear
    output: Product
    cross_norm: Tensor | None
    cross_query: Linear | None
    cross_output: Product | None
    ffn_norm: Tensor
    wide: Linear
    narrow: Product


class T5Stack:
    """What both sides share: embedding, projections and feed-forward. Weights only.

    bias_tables: of each layer, or of all in one, [num_heads, 2 * max_distance + 1]. num_heads: those of this rank.
    """

    def __init__(
        self, config: T5Config, side: str, embedding: Tensor, checkpoint: Checkpoint, kernels: Kernels
    ) -> None:
        num_layers = config.num_encoder_layers if side == "encoder" else config.num_decoder_layers
        tokens = checkpoint.shard.tokens(config.vocab_size)
        table = checkpoint.rows_or(f"{side}.embed_tokens.weight", embedding, tokens, config.vocab_size)
        self.config = config
        self.num_heads = len(checkpoint.shard.part(config.num_heads, _HEADS))
        self._kernels = kernels
        self._embedding = checkpoint.shard.embedding(table, tokens)
        self._final_norm = checkpoint.tensor(f"{side}.final_layer_norm.weight", config.hidden_size)
        self.bias_tables = tuple(
            _load_bias_table(config, side, checkpoint, index)
            for index in range(num_layers if config.per_layer_bias else 1)
        )
        self.layers = tuple(_load_layer(config, side, checkpoint, index) for index in range(num_layers))

    def embed(self, token_ids: Tensor, embeds: InputEmbeds | None) -> Tensor:
        hidden = self._embedding(token_ids)  # [num_tokens, hidden]
        return hidden if embeds is None else embeds.put_into(hidden)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, weight, self.config.norm_eps)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x, self._final_norm)

    def project(self, layer: T5Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [num_tokens, num_heads, head_dim]."""
        qkv = layer.qkv(self.norm(hidden, layer.attention_norm))
        query, key, value = qkv.view(len(hidden), 3, self.num_heads, self.config.head_dim).unbind(1)
        return query, key, value

    def feed_forward(self, layer: T5Layer, hidden: Tensor) -> Tensor:
        wide = layer.wide(self.norm(hidden, layer.ffn_norm))
        activate = self._kernels.gated_activate if self.config.gated else self._kernels.activate
        return layer.narrow(activate(wide, self.config.activation), hidden)


class T5Encoder:
    """Encoder and the projection of its output to the cross-attention of all decoder layers. Weights only."""

    def __init__(self, stack: T5Stack, cross: Linear, kernels: Kernels) -> None:
        self._stack = stack
        self._cross = cross
        self._kernels = kernels

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        return self._stack.embed(token_ids, None)

    def encode(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        config = self._stack.config
        cross = self._cross(self.hidden_states(token_ids, positions, cu_seqlens, embeds))
        return cross.view(len(token_ids), config.num_decoder_layers, 2, self._stack.num_heads, config.head_dim)

    def hidden_states(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        stack = self._stack
        plans = [
            self._kernels.plan_varlen_attention(
                cu_seqlens, causal=False, bias_table=bias_table, device=token_ids.device
            )
            for bias_table in stack.bias_tables
        ]
        hidden = stack.embed(token_ids, embeds)
        for layer, plan in zip(stack.layers, cycle(plans), strict=False):
            attended = self._kernels.varlen_attention(*stack.project(layer, hidden), plan, scale=_ATTENTION_SCALE)
            hidden = layer.output(attended.flatten(1), hidden)
            hidden = stack.feed_forward(layer, hidden)
        return stack.final_norm(hidden)


class T5Decoder:
    """Weights only, immutable after construction."""

    def __init__(self, stack: T5Stack, head: Linear, kernels: Kernels) -> None:
        self._stack = stack
        self._head = head
        self._kernels = kernels

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        embeds: InputEmbeds | None = None,
    ) -> Tensor:
        stack = self._stack
        self_plans = [
            metadata.plan_self(self._kernels, kv_cache.block_size, bias_table=bias_table)
            for bias_table in stack.bias_tables
        ]
        cross_plan = metadata.plan_cross(self._kernels, kv_cache.block_size)
        hidden = stack.embed(token_ids, embeds)  # [num_tokens, hidden]
        for index, (layer, self_plan) in enumerate(zip(stack.layers, cycle(self_plans), strict=False)):
            assert layer.cross_norm is not None and layer.cross_query and layer.cross_output, "no cross-attention"
            key_cache, value_cache = kv_cache.layer(index)
            query, key, value = stack.project(layer, hidden)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, self_plan, scale=_ATTENTION_SCALE)
            hidden = layer.output(attended.flatten(1), hidden)
            query = layer.cross_query(stack.norm(hidden, layer.cross_norm)).view_as(query)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, cross_plan, scale=_ATTENTION_SCALE)
            hidden = layer.cross_output(attended.flatten(1), hidden)
            hidden = stack.feed_forward(layer, hidden)
        return stack.final_norm(metadata.wanted(hidden))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden * self._stack.config.output_scale).float()


def compact_bias_table(buckets: Tensor, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Bias of each distance -max_distance .. max_distance (key minus query): [num_heads, 2 * max_distance + 1].

    buckets: [num_buckets, num_heads]. Exact for every distance, because all from `max_distance` on share a bucket.
    Near distances have a bucket each, farther ones share them logarithmically (https://arxiv.org/abs/1910.10683, 2.1).
    A decoder never looks ahead, so its positive half is never read.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device=buckets.device)
    num_buckets = len(buckets) // 2 if bidirectional else len(buckets)
    offset = (distance > 0).long() * num_buckets if bidirectional else torch.zeros_like(distance)
    distance = distance.abs() if bidirectional else distance.clamp(max=0).neg()
    num_exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (ratio * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return buckets[offset + torch.where(distance < num_exact, distance, far)].T.contiguous()


def build_t5(family: T5Family, config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    settings, shard = read_t5_config(config, family), checkpoint.shard
    vocab_size, tokens = settings.vocab_size, shard.tokens(settings.vocab_size)
    embedding = checkpoint.rows(checkpoint.first_of(_SHARED_NAMES), tokens, vocab_size, settings.hidden_size)
    encoder, decoder = (T5Stack(settings, side, embedding, checkpoint, kernels) for side in ("encoder", "decoder"))
    cross_names = [
        f"decoder.block.{index}.layer.1.EncDecAttention.{name}"
        for index in range(settings.num_decoder_layers)
        for name in "kv"
    ]
    widths = (settings.inner_size,) * len(cross_names)
    cross = checkpoint.linear(
        cross_names, widths, settings.hidden_size, bias=False, split=shard.outputs(widths, _HEADS)
    )
    head = checkpoint.output_layer(_HEAD, embedding, tokens, vocab_size, tied=True)
    return LanguageModel(
        decoder=T5Decoder(decoder, head, kernels),
        encoder=T5Encoder(encoder, cross, kernels),
        kv_shape=KVCacheShape(settings.num_decoder_layers, decoder.num_heads, settings.head_dim, checkpoint.dtype),
        num_kv_heads=settings.num_heads,
        vocab_size=vocab_size,
        max_model_len=settings.max_len,
        max_encoder_len=settings.max_len,
        hidden_size=settings.hidden_size,
    )


def _load_bias_table(config: T5Config, side: str, checkpoint: Checkpoint, index: int) -> Tensor:
    name = f"{side}.block.{index}.layer.0.SelfAttention.relative_attention_bias.weight"
    heads = as_slice(checkpoint.shard.part(config.num_heads, _HEADS))
    buckets = checkpoint.tensor(name, config.num_buckets, config.num_heads)[:, heads]
    return compact_bias_table(buckets, config.max_distance, bidirectional=side == "encoder")


def _load_layer(config: T5Config, side: str, checkpoint: Checkpoint, index: int) -> T5Layer:
    block, hidden, inner = f"{side}.block.{index}.layer", config.hidden_size, config.inner_size
    has_cross, shard = side == "decoder", checkpoint.shard
    ffn = f"{block}.{2 if has_cross else 1}"
    wide_names = [f"{ffn}.DenseReluDense.{name}" for name in (("wi_0", "wi_1") if config.gated else ("wi",))]
    wide_widths = (config.ffn_size,) * len(wide_names)

    def enter(names: Sequence[str], widths: Sequence[int], what: str) -> Linear:
        return checkpoint.linear(names, widths, hidden, bias=False, split=shard.outputs(widths, what))

    def leave(name: str, in_features: int, what: str) -> Product:
        split = shard.inputs(in_features, what)
        return shard.summed(checkpoint.linear([name], (hidden,), in_features, bias=False, split=split))

    return T5Layer(
        attention_norm=checkpoint.tensor(f"{block}.0.layer_norm.weight", hidden),
        qkv=enter([f"{block}.0.SelfAttention.{name}" for name in "qkv"], (inner,) * 3, _HEADS),
        output=leave(f"{block}.0.SelfAttention.o", inner, _HEADS),
        cross_norm=checkpoint.tensor(f"{block}.1.layer_norm.weight", hidden) if has_cross else None,
        cross_query=enter([f"{block}.1.EncDecAttention.q"], (inner,), _HEADS) if has_cross else None,
        cross_output=leave(f"{block}.1.EncDecAttention.o", inner, _HEADS) if has_cross else None,
        ffn_norm=checkpoint.tensor(f"{ffn}.layer_norm.weight", hidden),
        wide=enter(wide_names, wide_widths, _WIDTH),
        narrow=leave(f"{ffn}.DenseReluDense.wo", config.ffn_size, _WIDTH),
    )
