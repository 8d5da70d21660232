"""Llama checkpoints with random packed weights, for the benchmark of models on a GPU.

What the numbers are does not matter to the time of a step; that they are small does, or hidden states would overflow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import Shape
from safetensors.torch import save_file
from torch import Tensor

_GROUP = 128  # inputs that share a scale, in int4
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class Packing:
    """quantization: of config.json. layer_bytes: that a step reads for each weight of a linear layer."""

    quantization: dict[str, Any]
    layer_bytes: float


AWQ = Packing(
    {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "version": "gemm", "zero_point": True},
    0.5 + 3 / _GROUP,  # a scale in 16 bits and a zero point in 8
)
FP8 = Packing({"quant_method": "fp8", "activation_scheme": "dynamic"}, 1.0)


def save_packed(shape: Shape, packing: Packing, directory: Path) -> Path:
    """Write the checkpoint, a file for each layer, unless it is there."""
    config = {"architectures": [shape.model_class], "model_type": "llama", "dtype": "bfloat16", **shape.config}
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for file, tensors in _files(shape, packing):
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": packing.quantization}))
    return directory


def _files(shape: Shape, packing: Packing) -> Iterator[tuple[str, dict[str, Tensor]]]:
    config = shape.config
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layers = {
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kv_heads, hidden)),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (width, hidden)),
        "mlp.down_proj": (hidden, width),
    }
    pack = _awq if packing is AWQ else _fp8
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        tensors = {f"{prefix}.{norm}_layernorm.weight": _ones(hidden) for norm in ("input", "post_attention")}
        for layer, (out_features, in_features) in layers.items():
            tensors |= {f"{prefix}.{layer}.{end}": part for end, part in pack(out_features, in_features).items()}
        yield f"layer-{index}.safetensors", tensors
    rest = {"model.norm.weight": _ones(hidden), "model.embed_tokens.weight": _normal(config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        rest["lm_head.weight"] = _normal(config["vocab_size"], hidden)
    yield "rest.safetensors", rest


def _awq(out_features: int, in_features: int) -> dict[str, Tensor]:
    words, groups = out_features // _PER_WORD, in_features // _GROUP
    return {
        "qweight": torch.randint(-(2**31), 2**31, (in_features, words), dtype=torch.int32),
        "qzeros": torch.full((groups, words), -0x77777778, dtype=torch.int32),  # eight times 8
        "scales": torch.full((groups, out_features), 0.004, dtype=torch.float16),
    }


def _fp8(out_features: int, in_features: int) -> dict[str, Tensor]:
    values = torch.randn((out_features, in_features)).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": torch.full((out_features, 1), 0.02)}


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape).mul_(0.02).bfloat16()
