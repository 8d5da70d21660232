"""What the decoder-only graph is told about a model: plain values, the same for every family."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trivium.executor.models.rope import RotaryConfig
from trivium_kernels.activation import Activation


class NormKind(StrEnum):
    """rms_plus_one: RMSNorm whose stored weight is the difference from one. plain_layer: LayerNorm without weights."""

    RMS = "rms"
    RMS_PLUS_ONE = "rms_plus_one"
    LAYER = "layer"
    PLAIN_LAYER = "plain_layer"


class HeadNormKind(StrEnum):
    """How queries and keys are normed before they are rotated.

    per_head: each head by one RMSNorm of the width of a head. full: all heads together by one RMSNorm of their whole
    width. own_layer: each head by a LayerNorm of its own, without bias.
    """

    NONE = "none"
    PER_HEAD = "per_head"
    FULL = "full"
    OWN_LAYER = "own_layer"


class QkvLayout(StrEnum):
    """How queries, keys and values are stored.

    separate: three layers. stacked: one layer, all queries, then all keys, then all values. grouped: one layer, for
    each key head its queries, its key and its value.
    """

    SEPARATE = "separate"
    STACKED = "stacked"
    GROUPED = "grouped"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames:
    """Norms around attention or feed-forward, named within a layer; None where there is none.

    enter: what the block sees. update: what it puts out, before that is added to the stream. leave: the stream after.
    """

    enter: str | None = None
    update: str | None = None
    leave: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Where a family's checkpoints have their tensors; names of layers' tensors are within `layers`.N.

    positions: learned position embeddings. project_in, project_out: between the width of embeddings and of the stream.
    gate_up: gate and up projection, or one that holds both, or that of a plain feed-forward. head: the output, the
    first of these that is stored. conv1d: weights are stored as [in_features, out_features].
    """

    prefix: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    layers: str = "layers"
    final_norm: str | None = "norm"
    head: tuple[str, ...] = ("lm_head",)
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: QkvLayout = QkvLayout.SEPARATE
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norms: BlockNames = BlockNames(enter="input_layernorm")
    mlp_norms: BlockNames = BlockNames(enter="post_attention_layernorm")
    conv1d: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A router and its experts, gated feed-forwards of width `intermediate_size`, named within a layer.

    normalized: the weights of a token's experts are made to sum to one. shared_size: width of the expert that every
    token goes through, weighed by a gate of its own; 0 where there is none.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalized: bool
    shared_size: int = 0
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """window: tokens that are seen, None for all. rotary: index into the model's `rotaries`, None for no rotation.

    scale: of the products of queries and keys. moe: None for a plain feed-forward.
    """

    scale: float
    window: int | None = None
    rotary: int | None = 0
    moe: MoeConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """embedding_size differs from hidden_size only where embeddings are projected. gated: the feed-forward has a gate.

    parallel: attention and feed-forward see the same stream, and both are added to it; a feed-forward without a norm of
    its own sees what attention sees. position_offset: position p is row p + offset of the learned table.
    residual_multiplier is of each block's update. logit_divisor and logit_soft_cap act on the logits in this order.
    """

    names: TensorNames
    vocab_size: int
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    tied: bool
    layers: tuple[LayerConfig, ...]
    rotaries: tuple[RotaryConfig, ...] = ()
    gated: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: HeadNormKind = HeadNormKind.NONE
    position_offset: int = 0
    embedding_multiplier: float = 1.0
    embeds_are_multiplied: bool = False
    residual_multiplier: float = 1.0
    attention_soft_cap: float | None = None
    logit_divisor: float = 1.0
    logit_soft_cap: float | None = None
