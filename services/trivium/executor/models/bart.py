"""Encoder-decoder graph of BART and its relatives: LayerNorm before or after each block, positions added to tokens.

Which relative it is, `bart_families` says: BART, mBART, Marian, Pegasus, M2M100 and NLLB, Blenderbot, BlenderbotSmall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear, Product
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.bart_families import (
    BartConfig,
    BartFamily,
    EmbeddingNorm,
    Positions,
    StackConfig,
    read_bart_config,
)
from trivium.executor.models.model import InputEmbeds, LanguageModel
from trivium.executor.models.positions import PositionTable, padded_sinusoidal_table, sinusoidal_table
from trivium.executor.parallel.shard import Embedding
from trivium_kernels.dispatch import Kernels
from trivium_kernels.paged_attention import PagedAttentionPlan

_NORM_EPS = 1e-5
_HEAD = "lm_head.weight"
_HEADS, _WIDTH = "attention heads", "feed-forward columns"  # what is split, in an error
_ENCODER_TOKENS, _DECODER_TOKENS = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
_SHARED = "model.shared.weight"


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BartLayer:
    """Weights of one layer; the cross-attention is None in the encoder. Its keys and values are the encoder's."""

    qkv: Linear
    output: Product
    attention_norm: Norm
    cross_query: Linear | None
    cross_output: Product | None
    cross_norm: Norm | None
    fc1: Linear
    fc2: Product
    final_norm: Norm


class BartStack:
    """What both sides share: embedding, residual blocks and their norms. Weights only.

    num_heads: those of this rank.
    """

    def __init__(self, config: StackConfig, embedding: Embedding, checkpoint: Checkpoint, kernels: Kernels) -> None:
        hidden, family = config.hidden_size, config.family
        self.config = config
        self.num_heads = len(checkpoint.shard.part(config.num_heads, _HEADS))
        self.scale = config.head_dim**-0.5
        self.positions = _load_positions(config, checkpoint)
        self._kernels = kernels
        self._embedding = embedding
        self._embedding_norm: Norm | None = None
        if family.embedding_norm is not EmbeddingNorm.NONE:
            self._embedding_norm = _load_norm(checkpoint, f"{config.prefix}.layernorm_embedding", hidden)
        self.layers = tuple(_load_layer(config, checkpoint, index) for index in range(config.num_layers))
        self._final_norm = _load_norm(checkpoint, f"{config.prefix}.layer_norm", hidden) if family.pre_norm else None

    def embed(self, token_ids: Tensor, positions: Tensor, embeds: InputEmbeds | None = None) -> Tensor:
        """[num_tokens] ids and positions -> [num_tokens, hidden]. As in transformers, `embeds` are scaled already, or
        in a decoder that scales what its embedding module gives, not yet."""
        is_scaled = self.config.family.table_is_scaled or not self.config.is_decoder
        tokens = self._embedding(token_ids)
        if embeds is not None and not is_scaled:
            tokens = embeds.put_into(tokens)
        tokens = tokens * self.config.embedding_scale
        if embeds is not None and is_scaled:
            tokens = embeds.put_into(tokens)
        if embeds is not None:
            token_ids = embeds.mark(token_ids)
        places = self.positions.embed(token_ids, positions)
        if self._embedding_norm is None:
            return tokens + places
        if self.config.norms_tokens:
            return self._norm(tokens, self._embedding_norm) + places
        return self._norm(tokens + places, self._embedding_norm)

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        scale = self.config.embedding_scale if self.config.family.table_is_scaled else 1.0
        return self._embedding(token_ids) * scale

    def project(self, layer: BartLayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [num_tokens, num_heads, head_dim]."""
        qkv = layer.qkv(self.enter(hidden, layer.attention_norm))
        query, key, value = qkv.view(len(hidden), 3, self.num_heads, -1).unbind(1)
        return query, key, value

    def enter(self, hidden: Tensor, norm: Norm) -> Tensor:
        """The residual stream as a block with this norm sees it."""
        return self._norm(hidden, norm) if self.config.family.pre_norm else hidden

    def leave(self, hidden: Tensor, last: Product, x: Tensor, norm: Norm) -> Tensor:
        """The residual stream after a block with this norm, whose `last` layer gets `x`."""
        hidden = last(x, hidden)
        return hidden if self.config.family.pre_norm else self._norm(hidden, norm)

    def feed_forward(self, layer: BartLayer, hidden: Tensor) -> Tensor:
        wide = layer.fc1(self.enter(hidden, layer.final_norm))
        return self.leave(hidden, layer.fc2, self._kernels.activate(wide, self.config.activation), layer.final_norm)

    def finish(self, hidden: Tensor) -> Tensor:
        """What the stack puts out when its last layer has left `hidden`."""
        return hidden if self._final_norm is None else self._norm(hidden, self._final_norm)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._kernels.layer_norm(x, norm.weight, norm.bias, _NORM_EPS)


class BartEncoder:
    """Encoder and the projection of its output to the cross-attention of all decoder layers. Weights only."""

    def __init__(self, stack: BartStack, cross: Linear, cross_shape: KVCacheShape, kernels: Kernels) -> None:
        self._stack = stack
        self._cross = cross
        self._cross_shape = cross_shape
        self._kernels = kernels

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        return self._stack.word_embeddings(token_ids)

    def encode(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        shape = self._cross_shape
        cross = self._cross(self.hidden_states(token_ids, positions, cu_seqlens, embeds))
        return cross.view(len(token_ids), shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)

    def hidden_states(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        stack = self._stack
        plan = self._kernels.plan_varlen_attention(cu_seqlens, causal=False, device=token_ids.device)
        named = token_ids if embeds is None else embeds.mark(token_ids)
        hidden = stack.embed(token_ids, stack.positions.skip_padding(named, positions), embeds)
        for layer in stack.layers:
            attended = self._kernels.varlen_attention(*stack.project(layer, hidden), plan, scale=stack.scale)
            hidden = stack.leave(hidden, layer.output, attended.flatten(1), layer.attention_norm)
            hidden = stack.feed_forward(layer, hidden)
        return stack.finish(hidden)


class BartDecoder:
    """Weights only, immutable after construction."""

    def __init__(self, stack: BartStack, head: Linear, kernels: Kernels) -> None:
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
        self_plan = metadata.plan_self(self._kernels, kv_cache.block_size)
        cross_plan = metadata.plan_cross(self._kernels, kv_cache.block_size)
        hidden = stack.embed(token_ids, positions, embeds)  # [num_tokens, hidden]
        for index, layer in enumerate(stack.layers):
            key_cache, value_cache = kv_cache.layer(index)
            query, key, value = stack.project(layer, hidden)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, self_plan, scale=stack.scale)
            hidden = stack.leave(hidden, layer.output, attended.flatten(1), layer.attention_norm)
            hidden = self._attend_to_encoder(layer, hidden, key_cache, value_cache, cross_plan)
            hidden = stack.feed_forward(layer, hidden)
        return stack.finish(metadata.wanted(hidden))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).float()

    def _attend_to_encoder(
        self, layer: BartLayer, hidden: Tensor, key_cache: Tensor, value_cache: Tensor, plan: PagedAttentionPlan
    ) -> Tensor:
        assert layer.cross_query and layer.cross_output and layer.cross_norm, "a decoder layer has cross-attention"
        stack = self._stack
        query = layer.cross_query(stack.enter(hidden, layer.cross_norm)).view(len(hidden), stack.num_heads, -1)
        attended = self._kernels.paged_attention(query, key_cache, value_cache, plan, scale=stack.scale)
        return stack.leave(hidden, layer.cross_output, attended.flatten(1), layer.cross_norm)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What embeds tokens on each side and what scores them, all of `size` tokens. Tied ones are one tensor."""

    size: int
    encoder: Embedding
    decoder: Embedding
    head: Linear


def build_bart(family: BartFamily, json_config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    config = read_bart_config(json_config, family)
    checkpoint.add_missing_prefix("model")
    vocabulary = _load_vocabulary(config, checkpoint)
    encoder = BartStack(config.encoder, vocabulary.encoder, checkpoint, kernels)
    decoder = BartStack(config.decoder, vocabulary.decoder, checkpoint, kernels)
    kv_shape = KVCacheShape(config.decoder.num_layers, decoder.num_heads, config.decoder.head_dim, checkpoint.dtype)
    cross_names = [
        f"{config.decoder.prefix}.layers.{index}.encoder_attn.{name}_proj"
        for index in range(config.decoder.num_layers)
        for name in "kv"
    ]
    hidden_size = config.decoder.hidden_size
    widths = (hidden_size,) * len(cross_names)
    split = checkpoint.shard.outputs(widths, _HEADS)
    cross = checkpoint.linear(cross_names, widths, hidden_size, bias=True, split=split)
    return LanguageModel(
        decoder=BartDecoder(decoder, vocabulary.head, kernels),
        encoder=BartEncoder(encoder, cross, kv_shape, kernels),
        kv_shape=kv_shape,
        num_kv_heads=config.decoder.num_heads,
        vocab_size=vocabulary.size,
        max_model_len=config.decoder.max_positions,
        max_encoder_len=config.encoder.max_positions,
        hidden_size=config.encoder.hidden_size,
    )


def _load_vocabulary(config: BartConfig, checkpoint: Checkpoint) -> Vocabulary:
    """Vocabularies of different sizes are filled up to the larger one with tokens that are zero and never sampled."""
    hidden_size, size = config.decoder.hidden_size, max(config.encoder_vocab_size, config.decoder_vocab_size)
    num_rows, shard = config.decoder_vocab_size, checkpoint.shard
    tokens = shard.tokens(size)
    if config.shared:
        names = (_SHARED, *((_HEAD,) if config.tied else ()), _DECODER_TOKENS, _ENCODER_TOKENS)
        tied_to = checkpoint.rows(checkpoint.first_of(names), tokens, size, hidden_size)
        encoder, decoder = (
            checkpoint.rows_or(name, tied_to, tokens, size) for name in (_ENCODER_TOKENS, _DECODER_TOKENS)
        )
    else:
        encoder = checkpoint.rows(_ENCODER_TOKENS, tokens, config.encoder_vocab_size, hidden_size)
        names = (_DECODER_TOKENS, _HEAD) if config.tied else (_DECODER_TOKENS,)
        tied_to = decoder = checkpoint.rows(checkpoint.first_of(names), tokens, num_rows, hidden_size)
    output = checkpoint.output_weight(_HEAD, tied_to, tokens, num_rows, tied=config.tied)
    rows = {id(table): _fill_rows(table, len(tokens)) for table in (encoder, decoder, output)}
    bias = _load_logits_bias(config, checkpoint, size)
    head = Linear(rows[id(output)], None if bias is None else bias[tokens.start : tokens.stop])
    return Vocabulary(
        size, shard.embedding(rows[id(encoder)], tokens), shard.embedding(rows[id(decoder)], tokens), head
    )


def _load_logits_bias(config: BartConfig, checkpoint: Checkpoint, size: int) -> Tensor | None:
    """[size] of all ranks, minus infinity for the tokens that only fill the vocabulary up."""
    num_missing = size - config.decoder_vocab_size
    bias = None
    if config.decoder.family.has_logits_bias and "final_logits_bias" in checkpoint:
        bias = checkpoint.tensor("final_logits_bias", 1, config.decoder_vocab_size).squeeze(0)
    if not num_missing:
        return bias
    if bias is None:
        bias = torch.zeros(config.decoder_vocab_size, dtype=checkpoint.dtype, device=checkpoint.device)
    return F.pad(bias, (0, num_missing), value=-math.inf)


def _fill_rows(table: Tensor, num_rows: int) -> Tensor:
    return table if len(table) == num_rows else F.pad(table, (0, 0, 0, num_rows - len(table)))


def _load_positions(config: StackConfig, checkpoint: Checkpoint) -> PositionTable:
    name, family, size = f"{config.prefix}.embed_positions.weight", config.family, config.hidden_size
    if config.padding_id is not None:
        offset = config.padding_id + 1
        table = padded_sinusoidal_table(config.max_positions + offset, size, config.padding_id)
        return PositionTable(table.to(checkpoint.device, checkpoint.dtype), offset, config.padding_id)
    if family.positions is Positions.SINUSOIDAL and name not in checkpoint:
        table = sinusoidal_table(config.max_positions, size)
        return PositionTable(table.to(checkpoint.device, checkpoint.dtype))
    offset = family.position_offset
    return PositionTable(checkpoint.tensor(name, config.max_positions + offset, size), offset)


def _load_norm(checkpoint: Checkpoint, name: str, hidden_size: int) -> Norm:
    return Norm(checkpoint.tensor(f"{name}.weight", hidden_size), checkpoint.tensor(f"{name}.bias", hidden_size))


def _load_layer(config: StackConfig, checkpoint: Checkpoint, index: int) -> BartLayer:
    prefix, hidden = f"{config.prefix}.layers.{index}", config.hidden_size
    has_cross, shard = config.is_decoder, checkpoint.shard

    def enter(names: Sequence[str], width: int, what: str) -> Linear:
        widths, layers = (width,) * len(names), [f"{prefix}.{name}" for name in names]
        return checkpoint.linear(layers, widths, hidden, bias=True, split=shard.outputs(widths, what))

    def leave(name: str, in_features: int, what: str) -> Product:
        split = shard.inputs(in_features, what)
        return shard.summed(checkpoint.linear([f"{prefix}.{name}"], (hidden,), in_features, bias=True, split=split))

    return BartLayer(
        qkv=enter([f"self_attn.{name}_proj" for name in "qkv"], hidden, _HEADS),
        output=leave("self_attn.out_proj", hidden, _HEADS),
        attention_norm=_load_norm(checkpoint, f"{prefix}.self_attn_layer_norm", hidden),
        cross_query=enter(["encoder_attn.q_proj"], hidden, _HEADS) if has_cross else None,
        cross_output=leave("encoder_attn.out_proj", hidden, _HEADS) if has_cross else None,
        cross_norm=_load_norm(checkpoint, f"{prefix}.encoder_attn_layer_norm", hidden) if has_cross else None,
        fc1=enter(["fc1"], config.ffn_size, _WIDTH),
        fc2=leave("fc2", config.ffn_size, _WIDTH),
        final_norm=_load_norm(checkpoint, f"{prefix}.final_layer_norm", hidden),
    )
