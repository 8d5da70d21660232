"""Which way the linear layers of a model multiply: decided once, at load, by device and settings."""

from __future__ import annotations

from trivium.config import ExecutorConfig
from trivium.executor.gpu_linear import quantize
from trivium.executor.linear import Linear, find_linears
from trivium.executor.linear_tuning import tune
from trivium.executor.loader import Checkpoint
from trivium.executor.models.model import LanguageModel
from trivium.executor.platform import Platform
from trivium.executor.weight_packer import WeightPacker


def choose_packer(config: ExecutorConfig, platform: Platform) -> WeightPacker | None:
    """What keeps packed weights as they are: on a GPU, if they are not to be int8 like all others.

    On a CPU they are packed anew, for the kernels that are there.
    """
    if not platform.is_gpu or config.quantization == "int8":
        return None
    kernels = platform.kernels
    return WeightPacker(kernels.int4_linear, kernels.byte_linear, platform.device, platform.dtype)


def choose_products(config: ExecutorConfig, platform: Platform, model: LanguageModel, checkpoint: Checkpoint) -> None:
    """How layers of floats multiply: on a CPU whatever trials find, on a GPU cuBLAS, or in 8 bits."""
    if not platform.is_gpu:
        linears = _layers_to_tune(model, checkpoint)
        tune(
            linears,
            allow_half=checkpoint.stores_half,
            quantization=config.quantization,
            in_bfloat16=config.dtype == "bfloat16",
        )
    elif config.quantization == "int8":
        quantize(find_linears((model.decoder, model.encoder)), platform.kernels.byte_linear)


def _layers_to_tune(model: LanguageModel, checkpoint: Checkpoint) -> list[Linear]:
    """All layers, of a split model without those that every rank computes.

    Trials may end differently, and what such a layer finds, the choice of experts for example, must be the same on all.
    """
    linears = find_linears((model.decoder, model.encoder))
    return [linear for linear in linears if checkpoint.shard.size == 1 or linear not in checkpoint.whole_layers]
