"""Tiny checkpoints in every format of quantized weights, each beside one with the weights that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packers
from packers import Packer, quantize_checkpoint
from tiny import save_tiny

AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
NOT_PACKED = ("embed", "shared", "lm_head", "norm", "relative_attention_bias")


def compressed(form: str, targets: list[str] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": targets or ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq-32": ({**GPTQ, "group_size": 32}, packers.gptq()),
    "gptq-64-v2-asym": (
        {**GPTQ, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
        packers.gptq(group_size=64, symmetric=False, version=2),
    ),
    "gptq-128-asym": ({**GPTQ, "group_size": 128, "sym": False}, packers.gptq(group_size=128, symmetric=False)),
    "gptq-channel": ({**GPTQ, "group_size": -1}, packers.gptq(group_size=-1)),
    "gptq-ordered": (
        {**GPTQ, "group_size": 32, "desc_act": True, "sym": False},
        packers.gptq(ordered=True, symmetric=False),
    ),
    "gptq-own-order": (
        {**GPTQ, "group_size": 16, "desc_act": True, "sym": False},
        packers.gptq(group_size=16, own_order=True, symmetric=False),
    ),
    "gptq-2bit": (
        {**GPTQ, "bits": 2, "group_size": 16, "sym": False},
        packers.gptq(bits=2, group_size=16, symmetric=False),
    ),
    "gptq-8bit": ({**GPTQ, "bits": 8, "group_size": 32}, packers.gptq(bits=8)),
    "gptq-8bit-128": ({**GPTQ, "bits": 8, "group_size": 128}, packers.gptq(bits=8, group_size=128)),
    "gptq-8bit-channel": ({**GPTQ, "bits": 8, "group_size": -1}, packers.gptq(bits=8, group_size=-1)),
    "awq-32": ({**AWQ, "group_size": 32}, packers.awq()),
    "awq-64": ({**AWQ, "group_size": 64}, packers.awq(group_size=64)),
    "awq-channel": ({**AWQ, "group_size": -1}, packers.awq(group_size=-1)),
    "fp8-tensor": (FP8, packers.fp8()),
    "fp8-channel": ({**FP8, "quant_method": "fbgemm_fp8"}, packers.fp8(scales="channel")),
    "fp8-block": (
        {**FP8, "weight_block_size": [16, 32]},
        packers.fp8(scales="block", block=(16, 32), name="weight_scale_inv"),
    ),
    "fp8-block-128": (
        {**FP8, "weight_block_size": [128, 128]},
        packers.fp8(scales="block", name="weight_scale_inv"),
    ),
    "ct-int4-32": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
        packers.packed_integers(),
    ),
    "ct-int4-ordered-asym": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False, actorder="group"),
        packers.packed_integers(symmetric=False, ordered=True),
    ),
    "ct-int4-channel": (
        compressed("pack-quantized", num_bits=4, strategy="channel"),
        packers.packed_integers(group_size=-1),
    ),
    "ct-int8-packed": (
        compressed("pack-quantized", num_bits=8, strategy="group", group_size=32),
        packers.packed_integers(bits=8),
    ),
    "ct-int8-packed-128": (
        compressed("pack-quantized", num_bits=8, strategy="group", group_size=128),
        packers.packed_integers(bits=8, group_size=128),
    ),
    "ct-int8": (compressed("int-quantized", num_bits=8, strategy="channel"), packers.int8()),
    "ct-int8-asym": (
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        packers.int8(symmetric=False),
    ),
    "ct-fp8-tensor": (compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), packers.fp8()),
    "ct-fp8-channel": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        packers.fp8(scales="channel"),
    ),
    "ct-fp8-block": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        packers.fp8(scales="block", block=(16, 32)),
    ),
}


def is_linear(layer: str) -> bool:
    return not any(part in layer for part in NOT_PACKED)


def quantized(family: str, form: str, path: Path, layers: Any = is_linear, **overrides: Any) -> tuple[Path, Path]:
    """(the quantized checkpoint, one with the weights that it stands for)"""
    config, pack = FORMATS[form]
    meant = save_tiny(family, path / "meant", **overrides)
    return quantize_checkpoint(meant, path / "quantized", config, pack, layers), meant
