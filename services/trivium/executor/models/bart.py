"""Encoder-decoder graph of BART: LayerNorm after each block, learned positions, by default one embedding for all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import read_activation
from trivium.executor.models.model import LanguageModel
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels
from trivium_kernels.paged_attention import PagedAttentionPlan

_POSITION_OFFSET = 2  # position p is row p + 2 of the table
_NORM_EPS = 1e-5
_EMBEDDING_NAMES = ("model.shared.weight", "model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """One side, encoder or decoder. prefix: where its tensors are."""

    prefix: str
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    max_positions: int
    embedding_scale: float
    activation: Activation

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BartLayer:
    """Weights of one layer; the cross-attention is None in the encoder. Its keys and values are the encoder's."""

    qkv: Linear
    output: Linear
    attention_norm: Norm
    cross_query: Linear | None
    cross_output: Linear | None
    cross_norm: Norm | None
    fc1: Linear
    fc2: Linear
    final_norm: Norm


class BartStack:
    """What both sides share: embedding, residual blocks and their norms. Weights only."""

    def __init__(self, config: StackConfig, embedding: Tensor, checkpoint: Checkpoint, kernels: Kernels) -> None:
        self.config = config
        self.scale = config.head_dim**-0.5
        self._kernels = kernels
        self._embedding = embedding
        self._positions = checkpoint.tensor(
            f"{config.prefix}.embed_positions.weight", config.max_positions + _POSITION_OFFSET, config.hidden_size
        )
        self._embedding_norm = _load_norm(checkpoint, f"{config.prefix}.layernorm_embedding", config.hidden_size)
        self.layers = tuple(_load_layer(config, checkpoint, index) for index in range(config.num_layers))

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens] ids and positions -> [num_tokens, hidden]."""
        tokens = F.embedding(token_ids, self._embedding) * self.config.embedding_scale
        return self.norm(tokens + F.embedding(positions + _POSITION_OFFSET, self._positions), self._embedding_norm)

    def project(self, layer: BartLayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [num_tokens, num_heads, head_dim]."""
        query, key, value = layer.qkv(hidden).view(len(hidden), 3, self.config.num_heads, -1).unbind(1)
        return query, key, value

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._kernels.layer_norm(x, norm.weight, norm.bias, _NORM_EPS)

    def feed_forward(self, layer: BartLayer, hidden: Tensor) -> Tensor:
        wide = self._kernels.activate(layer.fc1(hidden), self.config.activation)
        return self.norm(hidden + layer.fc2(wide), layer.final_norm)


class BartEncoder:
    """Encoder and the projection of its output to the cross-attention of all decoder layers. Weights only."""

    def __init__(self, stack: BartStack, cross: Linear, cross_shape: KVCacheShape, kernels: Kernels) -> None:
        self._stack = stack
        self._cross = cross
        self._cross_shape = cross_shape
        self._kernels = kernels

    def encode(self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        stack = self._stack
        plan = self._kernels.plan_varlen_attention(cu_seqlens, causal=False)
        hidden = stack.embed(token_ids, positions)
        for layer in stack.layers:
            attended = self._kernels.varlen_attention(*stack.project(layer, hidden), plan, scale=stack.scale)
            hidden = stack.norm(hidden + layer.output(attended.flatten(1)), layer.attention_norm)
            hidden = stack.feed_forward(layer, hidden)
        shape = self._cross_shape
        return self._cross(hidden).view(len(hidden), shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)


class BartDecoder:
    """Weights only, immutable after construction."""

    def __init__(self, stack: BartStack, head: Linear, kernels: Kernels) -> None:
        self._stack = stack
        self._head = head
        self._kernels = kernels

    def forward(self, token_ids: Tensor, positions: Tensor, kv_cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        stack = self._stack
        self_plan = metadata.plan_self(self._kernels, kv_cache.block_size)
        cross_plan = metadata.plan_cross(self._kernels, kv_cache.block_size)
        hidden = stack.embed(token_ids, positions)  # [num_tokens, hidden]
        for index, layer in enumerate(stack.layers):
            key_cache, value_cache = kv_cache.layer(index)
            query, key, value = stack.project(layer, hidden)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
            attended = self._kernels.paged_attention(query, key_cache, value_cache, self_plan, scale=stack.scale)
            hidden = stack.norm(hidden + layer.output(attended.flatten(1)), layer.attention_norm)
            hidden = self._attend_to_encoder(layer, hidden, key_cache, value_cache, cross_plan)
            hidden = stack.feed_forward(layer, hidden)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _attend_to_encoder(
        self, layer: BartLayer, hidden: Tensor, key_cache: Tensor, value_cache: Tensor, plan: PagedAttentionPlan
    ) -> Tensor:
        assert layer.cross_query and layer.cross_output and layer.cross_norm, "a decoder layer has cross-attention"
        query = layer.cross_query(hidden).view(len(hidden), self._stack.config.num_heads, -1)
        attended = self._kernels.paged_attention(query, key_cache, value_cache, plan, scale=self._stack.scale)
        return self._stack.norm(hidden + layer.cross_output(attended.flatten(1)), layer.cross_norm)


def build_bart(config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    vocab_size, hidden_size = config.integer("vocab_size", 50265), config.integer("d_model", 1024)
    encoder_config, decoder_config = (_read_stack(config, side, hidden_size) for side in ("encoder", "decoder"))
    tied = config.boolean("tie_word_embeddings", True)
    embedding = checkpoint.tensor(checkpoint.first_of(_EMBEDDING_NAMES), vocab_size, hidden_size)
    encoder, decoder = (
        BartStack(side, embedding if tied else _load_embedding(side, checkpoint, embedding), checkpoint, kernels)
        for side in (encoder_config, decoder_config)
    )
    kv_shape = KVCacheShape(decoder_config.num_layers, decoder_config.num_heads, decoder_config.head_dim)
    cross_names = [
        f"{decoder_config.prefix}.layers.{index}.encoder_attn.{name}_proj"
        for index in range(decoder_config.num_layers)
        for name in "kv"
    ]
    cross = checkpoint.linear(cross_names, (hidden_size,) * len(cross_names), hidden_size, bias=True)
    head_bias = None
    if "final_logits_bias" in checkpoint:
        head_bias = checkpoint.tensor("final_logits_bias", 1, vocab_size).squeeze(0)
    head = Linear(checkpoint.output_weight("lm_head.weight", embedding, tied=tied), head_bias)
    return LanguageModel(
        decoder=BartDecoder(decoder, head, kernels),
        encoder=BartEncoder(encoder, cross, kv_shape, kernels),
        kv_shape=kv_shape,
        vocab_size=vocab_size,
        max_model_len=decoder_config.max_positions,
        max_encoder_len=encoder_config.max_positions,
    )


def _read_stack(config: JsonConfig, side: str, hidden_size: int) -> StackConfig:
    return StackConfig(
        prefix=f"model.{side}",
        hidden_size=hidden_size,
        num_layers=config.integer(f"{side}_layers", 12),
        num_heads=config.integer(f"{side}_attention_heads", 16),
        ffn_size=config.integer(f"{side}_ffn_dim", 4096),
        max_positions=config.integer("max_position_embeddings", 1024),
        embedding_scale=math.sqrt(hidden_size) if config.boolean("scale_embedding", False) else 1.0,
        activation=read_activation(config, "activation_function", "gelu"),
    )


def _load_embedding(config: StackConfig, checkpoint: Checkpoint, shared: Tensor) -> Tensor:
    """An untied side's own embedding, or the shared one where it has none."""
    name = f"{config.prefix}.embed_tokens.weight"
    return checkpoint.tensor(name, *shared.shape) if name in checkpoint else shared


def _load_norm(checkpoint: Checkpoint, name: str, hidden_size: int) -> Norm:
    return Norm(checkpoint.tensor(f"{name}.weight", hidden_size), checkpoint.tensor(f"{name}.bias", hidden_size))


def _load_layer(config: StackConfig, checkpoint: Checkpoint, index: int) -> BartLayer:
    prefix, hidden = f"{config.prefix}.layers.{index}", config.hidden_size
    has_cross = f"{prefix}.encoder_attn.q_proj.weight" in checkpoint
    qkv_names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]

    def linear(name: str, width: int, in_features: int) -> Linear:
        return checkpoint.linear([f"{prefix}.{name}"], (width,), in_features, bias=True)

    return BartLayer(
        qkv=checkpoint.linear(qkv_names, (hidden,) * 3, hidden, bias=True),
        output=linear("self_attn.out_proj", hidden, hidden),
        attention_norm=_load_norm(checkpoint, f"{prefix}.self_attn_layer_norm", hidden),
        cross_query=linear("encoder_attn.q_proj", hidden, hidden) if has_cross else None,
        cross_output=linear("encoder_attn.out_proj", hidden, hidden) if has_cross else None,
        cross_norm=_load_norm(checkpoint, f"{prefix}.encoder_attn_layer_norm", hidden) if has_cross else None,
        fc1=linear("fc1", config.ffn_size, hidden),
        fc2=linear("fc2", hidden, config.ffn_size),
        final_norm=_load_norm(checkpoint, f"{prefix}.final_layer_norm", hidden),
    )
