"""Which implementation of each op a device uses. Decided once, when a model is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trivium_kernels import reference
from trivium_kernels.activation import Activate, GatedActivate
from trivium_kernels.add_lora import AddLora
from trivium_kernels.layer_norm import LayerNorm
from trivium_kernels.paged_attention import PagedAttention, PlanPagedAttention
from trivium_kernels.reshape_and_cache import ReshapeAndCache
from trivium_kernels.rms_norm import RmsNorm
from trivium_kernels.rotary_embedding import RotaryEmbedding
from trivium_kernels.token_bitmask import ApplyTokenBitmask
from trivium_kernels.varlen_attention import PlanVarlenAttention, VarlenAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of every op; plans are only for the attention op of the same instance."""

    rms_norm: RmsNorm
    layer_norm: LayerNorm
    rotary_embedding: RotaryEmbedding
    activate: Activate
    gated_activate: GatedActivate
    add_lora: AddLora
    reshape_and_cache: ReshapeAndCache
    plan_varlen_attention: PlanVarlenAttention
    varlen_attention: VarlenAttention
    plan_paged_attention: PlanPagedAttention
    paged_attention: PagedAttention
    apply_token_bitmask: ApplyTokenBitmask


def select_kernels(device: torch.device) -> Kernels:
    """The fastest implementation of each op for `device`. Raises ValueError where there is none."""
    if device.type != "cpu":
        raise ValueError(f"there are no kernels for device {device.type!r}, only for 'cpu'")
    return Kernels(
        rms_norm=reference.rms_norm,
        layer_norm=reference.layer_norm,
        rotary_embedding=reference.rotary_embedding,
        activate=reference.activate,
        gated_activate=reference.gated_activate,
        add_lora=reference.add_lora,
        reshape_and_cache=reference.reshape_and_cache,
        plan_varlen_attention=reference.plan_varlen_attention,
        varlen_attention=reference.varlen_attention,
        plan_paged_attention=reference.plan_paged_attention,
        paged_attention=reference.paged_attention,
        apply_token_bitmask=reference.apply_token_bitmask,
    )
