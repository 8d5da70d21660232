"""LoRA for a model that runs in transformers: hooks on its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from trivium.executor.adapter_pool import AdapterPool, LoraDelta


def add_adapters(
    adapters: AdapterPool, layers: Mapping[str, nn.Linear], run: Callable[[], object], num_tokens: int
) -> None:
    """Let `adapters` change those of `layers` that `run` calls once, with a row for each token.

    layers: by name. run: makes a forward pass of `num_tokens` tokens.

    An expert has the rows of some tokens only, and a layer whose weight is read without a call never comes here.
    """
    calls: dict[str, list[int]] = {}  # name of a layer -> rows of each of its calls

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.setdefault(name, []).append(inputs[0].shape[:-1].numel() if inputs else 0)

    hooks = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    run()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if calls.get(name) == [num_tokens]:
            delta = adapters.add_layer([name], [layer.out_features], layer.in_features)
            layer.register_forward_hook(partial(_add_delta, delta))


def _add_delta(delta: LoraDelta, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook of a linear layer: inputs[0] [..., in_features], output [..., out_features]."""
    delta.add_to(output.view(-1, output.shape[-1]), inputs[0].reshape(-1, inputs[0].shape[-1]))
    return output
