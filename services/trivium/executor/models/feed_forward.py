"""Feed-forward blocks of the decoder-only graph: plain, gated, and a mixture of gated experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trivium.executor.linear import Linear, Product
from trivium.executor.loader import Checkpoint
from trivium.executor.models.decoder_config import DecoderConfig, MoeConfig
from trivium.executor.parallel.shard import Shard, Split, as_slice
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels

FeedForward: TypeAlias = Product  # x [num_tokens, hidden] -> [num_tokens, hidden]
_WIDTH = "feed-forward columns"  # what is split, in an error


@dataclass(frozen=True, slots=True)
class PlainFeedForward:
    up: Linear
    down: Product
    activation: Activation
    kernels: Kernels

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.down(self.kernels.activate(self.up(x), self.activation), add)


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    gate_up: Linear
    down: Product
    activation: Activation
    kernels: Kernels

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.down(self.kernels.gated_activate(self.gate_up(x), self.activation), add)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Each token goes through its `num_experts_per_token` likeliest experts. https://arxiv.org/abs/2401.04088, 2.1.

    shared and shared_gate: an expert for all tokens and [1, hidden], how much of it each token takes; or None.
    """

    router: Linear
    experts: tuple[FeedForward, ...]
    shared: FeedForward | None
    shared_gate: Linear | None
    num_experts_per_token: int
    normalized: bool

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        weights, chosen = (
            self.router(x).float().softmax(dim=-1).topk(self.num_experts_per_token)
        )  # [num_tokens, per token]
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)  # pairs of token and place, those of one expert together
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        for expert, pairs in zip(self.experts, torch.split_with_sizes(order, counts), strict=True):
            if len(pairs):
                tokens = pairs // self.num_experts_per_token
                output.index_add_(0, tokens, expert(x[tokens]) * weights.view(-1, 1)[pairs].to(x.dtype))
        if self.shared is not None and self.shared_gate is not None:
            output += self.shared_gate(x).sigmoid() * self.shared(x)
        return output if add is None else output.add_(add)


def load_feed_forward(
    config: DecoderConfig, moe: MoeConfig | None, checkpoint: Checkpoint, kernels: Kernels, layer: str
) -> FeedForward:
    """That of the layer whose tensors are named `layer`. Raises ConfigurationError."""
    if moe is not None:
        return _load_mixture(config, moe, checkpoint, kernels, layer)
    names, width, hidden = config.names, config.intermediate_size, config.hidden_size
    up_names, shard = [f"{layer}.{name}" for name in names.gate_up], checkpoint.shard
    total = 2 * width if config.gated else width
    up = checkpoint.linear(
        up_names,
        (total // len(up_names),) * len(up_names),
        hidden,
        bias=config.mlp_bias,
        transposed=names.conv1d,
        split=_split_up(shard, width, num_layers=len(up_names), num_parts=total // width),
    )
    down = checkpoint.linear(
        [f"{layer}.{names.down}"],
        (hidden,),
        width,
        bias=config.mlp_bias,
        transposed=names.conv1d,
        split=shard.inputs(width, _WIDTH),
    )
    kind = GatedFeedForward if config.gated else PlainFeedForward
    return kind(up, shard.summed(down), config.activation, kernels)


def _split_up(shard: Shard, width: int, *, num_layers: int, num_parts: int) -> Split | None:
    """Of gate and up, one layer each or both in one, or of one without a gate."""
    if num_layers == num_parts:
        return shard.outputs((width,) * num_parts, _WIDTH)
    if shard.size == 1:
        return None
    part = shard.part(width, _WIDTH)
    return Split(rows=(tuple(as_slice(range(start + part.start, start + part.stop)) for start in (0, width)),))


def _load_mixture(
    config: DecoderConfig, moe: MoeConfig, checkpoint: Checkpoint, kernels: Kernels, layer: str
) -> FeedForward:
    """Every rank has a part of every expert, so it is all of them together that are summed."""
    hidden, shard = config.hidden_size, checkpoint.shard

    def gated(name: str, parts: tuple[str, str, str], width: int) -> GatedFeedForward:
        gate, up, down = (f"{layer}.{name}.{part}" for part in parts)
        return GatedFeedForward(
            checkpoint.linear(
                [gate, up], (width, width), hidden, bias=False, split=shard.outputs((width, width), _WIDTH)
            ),
            checkpoint.linear([down], (hidden,), width, bias=False, split=shard.inputs(width, _WIDTH)),
            config.activation,
            kernels,
        )

    experts = range(moe.num_experts)
    has_shared = moe.shared_size > 0
    mixture = MixtureOfExperts(
        router=checkpoint.linear([f"{layer}.{moe.router}"], (moe.num_experts,), hidden, bias=False),
        experts=tuple(gated(f"{moe.experts}.{index}", moe.expert_parts, moe.intermediate_size) for index in experts),
        shared=gated(moe.shared, ("gate_proj", "up_proj", "down_proj"), moe.shared_size) if has_shared else None,
        shared_gate=checkpoint.linear([f"{layer}.{moe.shared_gate}"], (1,), hidden, bias=False) if has_shared else None,
        num_experts_per_token=moe.num_experts_per_token,
        normalized=moe.normalized,
    )
    return shard.summed(mixture)
