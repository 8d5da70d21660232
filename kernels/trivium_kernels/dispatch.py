"""Which implementation of each op a device uses. Decided once, when a model is built."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from trivium_kernels import reference
from trivium_kernels.activation import Activate, GatedActivate
from trivium_kernels.add_lora import AddLora
from trivium_kernels.add_stacked_lora import AddStackedLora
from trivium_kernels.byte_linear import ByteLinear
from trivium_kernels.copy_blocks import CopyBlocks
from trivium_kernels.gather_logprobs import GatherLogprobs
from trivium_kernels.int4_linear import Int4Linear
from trivium_kernels.layer_norm import AddLayerNorm, LayerNorm
from trivium_kernels.logit_bias import AddLogitBias
from trivium_kernels.move_blocks import MoveBlocks
from trivium_kernels.paged_attention import PagedAttention, PlanPagedAttention
from trivium_kernels.penalties import ApplyPenalties, CountTokens
from trivium_kernels.reshape_and_cache import ReshapeAndCache
from trivium_kernels.rms_norm import AddRmsNorm, RmsNorm
from trivium_kernels.rotary_embedding import RotaryEmbedding
from trivium_kernels.rotate_and_cache import RotateAndCache
from trivium_kernels.sample_tokens import SampleTokens
from trivium_kernels.select_beams import SelectBeams
from trivium_kernels.token_bitmask import ApplyTokenBitmask
from trivium_kernels.varlen_attention import PlanVarlenAttention, VarlenAttention

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of every op; plans are only for the ops of the same instance."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    layer_norm: LayerNorm
    add_layer_norm: AddLayerNorm
    rotary_embedding: RotaryEmbedding
    activate: Activate
    gated_activate: GatedActivate
    reshape_and_cache: ReshapeAndCache
    rotate_and_cache: RotateAndCache
    apply_token_bitmask: ApplyTokenBitmask
    add_lora: AddLora
    plan_varlen_attention: PlanVarlenAttention
    varlen_attention: VarlenAttention
    plan_paged_attention: PlanPagedAttention
    paged_attention: PagedAttention
    add_logit_bias: AddLogitBias
    count_tokens: CountTokens
    apply_penalties: ApplyPenalties
    sample_tokens: SampleTokens
    gather_logprobs: GatherLogprobs
    select_beams: SelectBeams
    move_blocks: MoveBlocks
    copy_blocks: CopyBlocks
    int4_linear: Int4Linear
    byte_linear: ByteLinear
    add_stacked_lora: AddStackedLora


def select_kernels(device: torch.device) -> Kernels:
    """The fastest implementation of each op for `device`. Raises ValueError where there is none."""
    match device.type:
        case "cpu":
            return native_kernels() or torch_kernels()
        case "cuda":
            return _triton_kernels()
        case other:
            raise ValueError(f"there are no kernels for device {other!r}, only for 'cpu' and 'cuda'")


def torch_kernels() -> Kernels:
    """The reference: plain torch, on any device."""
    return Kernels(
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        layer_norm=reference.layer_norm,
        add_layer_norm=reference.add_layer_norm,
        rotary_embedding=reference.rotary_embedding,
        activate=reference.activate,
        gated_activate=reference.gated_activate,
        reshape_and_cache=reference.reshape_and_cache,
        rotate_and_cache=reference.rotate_and_cache,
        apply_token_bitmask=reference.apply_token_bitmask,
        add_lora=reference.add_lora,
        plan_varlen_attention=reference.plan_varlen_attention,
        varlen_attention=reference.varlen_attention,
        plan_paged_attention=reference.plan_paged_attention,
        paged_attention=reference.paged_attention,
        add_logit_bias=reference.add_logit_bias,
        count_tokens=reference.count_tokens,
        apply_penalties=reference.apply_penalties,
        sample_tokens=reference.sample_tokens,
        gather_logprobs=reference.gather_logprobs,
        select_beams=reference.select_beams,
        move_blocks=reference.move_blocks,
        copy_blocks=reference.copy_blocks,
        int4_linear=reference.int4_linear,
        byte_linear=reference.byte_linear,
        add_stacked_lora=reference.add_stacked_lora,
    )


def native_kernels() -> Kernels | None:
    """Those in C++ for CPUs, where the extension was built; the rarer ops are plain torch's."""
    try:
        from trivium_kernels import cpu
    except ImportError as error:
        logger.warning("the C++ kernels cannot be used, plain torch is slower: %s", error)
        return None
    return replace(
        torch_kernels(),
        rms_norm=cpu.rms_norm,
        layer_norm=cpu.layer_norm,
        rotary_embedding=cpu.rotary_embedding,
        activate=cpu.activate,
        gated_activate=cpu.gated_activate,
        reshape_and_cache=cpu.reshape_and_cache,
        rotate_and_cache=cpu.rotate_and_cache,
        apply_token_bitmask=cpu.apply_token_bitmask,
        plan_varlen_attention=cpu.plan_varlen_attention,
        varlen_attention=cpu.varlen_attention,
        plan_paged_attention=cpu.plan_paged_attention,
        paged_attention=cpu.paged_attention,
    )


def _triton_kernels() -> Kernels:
    """Triton is imported here and nowhere else: a machine without a GPU need not have it."""
    try:
        from trivium_kernels import gpu
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ValueError("device 'cuda' needs Triton: pip install 'trivium[gpu]'") from error
    return Kernels(
        rms_norm=gpu.rms_norm,
        add_rms_norm=gpu.add_rms_norm,
        layer_norm=gpu.layer_norm,
        add_layer_norm=gpu.add_layer_norm,
        rotary_embedding=gpu.rotary_embedding,
        activate=gpu.activate,
        gated_activate=gpu.gated_activate,
        reshape_and_cache=gpu.reshape_and_cache,
        rotate_and_cache=gpu.rotate_and_cache,
        apply_token_bitmask=gpu.apply_token_bitmask,
        add_lora=reference.add_lora,
        plan_varlen_attention=gpu.plan_varlen_attention,
        varlen_attention=gpu.varlen_attention,
        plan_paged_attention=gpu.plan_paged_attention,
        paged_attention=gpu.paged_attention,
        add_logit_bias=gpu.add_logit_bias,
        count_tokens=gpu.count_tokens,
        apply_penalties=gpu.apply_penalties,
        sample_tokens=gpu.sample_tokens,
        gather_logprobs=gpu.gather_logprobs,
        select_beams=gpu.select_beams,
        move_blocks=gpu.move_blocks,
        copy_blocks=gpu.copy_blocks,
        int4_linear=gpu.int4_linear,
        byte_linear=gpu.byte_linear,
        add_stacked_lora=gpu.add_stacked_lora,
    )
