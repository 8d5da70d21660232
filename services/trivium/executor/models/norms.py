"""Norms of the decoder-only graph: weights and the rule how they act, bound to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trivium.executor.loader import Checkpoint
from trivium.executor.models.decoder_config import DecoderConfig, HeadNormKind, NormKind
from trivium.executor.parallel.communicator import Communicator
from trivium_kernels.dispatch import Kernels


class Norm(Protocol):
    """x [num_tokens, ..., width] -> a new tensor like it."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RmsNorm:
    weight: Tensor
    eps: float
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class SplitRmsNorm:
    """RMSNorm over a width of which every rank has an equal part."""

    weight: Tensor
    eps: float
    communicator: Communicator

    def __call__(self, x: Tensor) -> Tensor:
        squares = self.communicator.gather(x.float().square().mean(dim=-1, keepdim=True)).mean(dim=0)
        return (x * torch.rsqrt(squares + self.eps)).to(x.dtype) * self.weight


@dataclass(frozen=True, slots=True)
class AllHeadsNorm:
    """One norm over all heads of a token: x [num_tokens, num_heads, head_dim]."""

    norm: Norm

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(1)).view(x.shape)


@dataclass(frozen=True, slots=True)
class OwnHeadNorm:
    """A norm without weights, then those of each head.

    x: [num_tokens, num_heads, head_dim]. weight: [num_heads, head_dim].
    """

    norm: Norm
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x).mul_(self.weight)


def load_norm(config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels, name: str, width: int) -> Norm:
    """The norm `name`, as the family norms its stream. Raises ConfigurationError."""
    match config.norm:
        case NormKind.RMS:
            return RmsNorm(checkpoint.tensor(f"{name}.weight", width), config.norm_eps, kernels)
        case NormKind.RMS_PLUS_ONE:
            return RmsNorm(checkpoint.tensor(f"{name}.weight", width).float() + 1, config.norm_eps, kernels)
        case NormKind.LAYER:
            weight, bias = (checkpoint.tensor(f"{name}.{part}", width) for part in ("weight", "bias"))
            return LayerNorm(weight, bias, config.norm_eps, kernels)
        case NormKind.PLAIN_LAYER:
            return _plain_layer_norm(width, config.norm_eps, checkpoint, kernels)


def load_head_norm(
    config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels, name: str, heads: range, num_heads: int
) -> Norm | None:
    """The norm `name` of queries or keys [num_tokens, len(heads), head_dim], which are those of `heads` of num_heads.

    Raises ConfigurationError.
    """
    match config.head_norm:
        case HeadNormKind.NONE:
            return None
        case HeadNormKind.PER_HEAD:
            return load_norm(config, checkpoint, kernels, name, config.head_dim)
        case HeadNormKind.FULL:
            width = num_heads * config.head_dim
            if len(heads) == num_heads:
                return AllHeadsNorm(load_norm(config, checkpoint, kernels, name, width))
            assert config.norm is NormKind.RMS, "no family has another norm over all heads"
            part = range(heads.start * config.head_dim, heads.stop * config.head_dim)
            weight = checkpoint.rows(f"{name}.weight", part, width)
            return AllHeadsNorm(SplitRmsNorm(weight, config.norm_eps, checkpoint.shard.communicator))
        case HeadNormKind.OWN_LAYER:
            weights = [checkpoint.tensor(f"{name}.norms.{head}.weight", config.head_dim) for head in heads]
            plain = _plain_layer_norm(config.head_dim, config.norm_eps, checkpoint, kernels)
            return OwnHeadNorm(plain, torch.stack(weights))


def _plain_layer_norm(width: int, eps: float, checkpoint: Checkpoint, kernels: Kernels) -> Norm:
    ones = torch.ones(width, dtype=checkpoint.dtype, device=checkpoint.device)
    return LayerNorm(ones, torch.zeros_like(ones), eps, kernels)
