"""Quantized checkpoints for tests: weights rounded in float64 and packed value by value, as each format defines it.

A packer takes the weight of one linear layer, [out, in], and returns the tensors that stand for it, by the ends of
their names, and the float64 weight that they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], np.ndarray]
Packer = Callable[[np.ndarray], Packed]


def group_numbers(in_features: int, group_size: int, *, shuffled: bool = False, seed: int = 0) -> np.ndarray:
    """The group of each input; shuffled, as if the inputs had been quantized in another order."""
    groups = np.arange(in_features) // (in_features if group_size == -1 else group_size)
    return np.random.default_rng(in_features + seed).permutation(groups) if shuffled else groups


def round_by_group(weight: np.ndarray, groups: np.ndarray, bits: int, *, symmetric: bool) -> tuple[Any, Any, Any]:
    """(integers [out, in] from 0 to 2^bits - 1, zero points and float16 scales [out, groups])."""
    top, num_groups = 2**bits - 1, int(groups.max()) + 1
    zeros, scales = (np.zeros((len(weight), num_groups)) for _ in range(2))
    for group in range(num_groups):
        part = weight[:, groups == group]
        if symmetric:
            scales[:, group] = 2 * abs(part).max(1) / top
            zeros[:, group] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.round(-low / scales[:, group]).clip(0, top)
    scales = scales.astype(np.float16).astype(np.float64)
    integers = np.round(weight / scales[:, groups] + zeros[:, groups]).clip(0, top)
    return integers.astype(np.int64), zeros.astype(np.int64), scales


def pack_rows(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, n] -> int32 [rows, n / per_word rounded up]; place i of a word has its value order[i]."""
    per_word = 32 // bits
    num_words = -(-values.shape[1] // per_word)
    words = np.zeros((len(values), num_words), np.uint32)
    for row in range(len(values)):
        for word in range(num_words):
            for place in range(per_word):
                column = word * per_word + (order[place] if order else place)
                if column < values.shape[1]:
                    words[row, word] |= np.uint32(int(values[row, column]) << (bits * place))
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    ordered: bool = False,
    own_order: bool = False,
    version: int = 1,
) -> Packer:
    """own_order: every layer has another one; else those with as many inputs have the same."""

    def pack(weight: np.ndarray) -> Packed:
        seed = int(abs(weight).sum() * 1e3) if own_order else 0
        groups = group_numbers(weight.shape[1], group_size, shuffled=ordered or own_order, seed=seed)
        integers, zeros, scales = round_by_group(weight, groups, bits, symmetric=symmetric)
        stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
        tensors = {
            "qweight": pack_rows(integers, bits).T.contiguous(),
            "qzeros": pack_rows(stored_zeros.T, bits),
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": torch.from_numpy(groups).int(),
        }
        return tensors, (integers - zeros[:, groups]) * scales[:, groups]

    return pack


def awq(*, group_size: int = 32) -> Packer:
    def pack(weight: np.ndarray) -> Packed:
        groups = group_numbers(weight.shape[1], group_size)
        integers, zeros, scales = round_by_group(weight, groups, 4, symmetric=False)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": pack_rows(integers.T, 4, order),
            "qzeros": pack_rows(zeros.T, 4, order),
            "scales": torch.from_numpy(scales.T.copy()).half(),
        }
        return tensors, (integers - zeros[:, groups]) * scales[:, groups]

    return pack


def fp8(*, scales: str = "tensor", block: tuple[int, int] = (128, 128), name: str = "weight_scale") -> Packer:
    """scales: of the "tensor", of each "channel" (output), or of each "block" of rows and columns."""

    def pack(weight: np.ndarray) -> Packed:
        rows, columns = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": block}[scales]
        grid = np.zeros((-(-len(weight) // rows), -(-weight.shape[1] // columns)))
        values, meaning = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), np.zeros_like(weight)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                place = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                grid[i, j] = np.float32(abs(weight[place]).max() / 448.0)
                values[place] = torch.from_numpy(weight[place] / grid[i, j]).to(torch.float8_e4m3fn)
                meaning[place] = values[place].double().numpy() * grid[i, j]
        scale = torch.from_numpy(grid).float()
        return {"weight": values, name: scale.reshape(()) if scales == "tensor" else scale}, meaning

    return pack


def packed_integers(*, bits: int = 4, group_size: int = 32, symmetric: bool = True, ordered: bool = False) -> Packer:
    """pack-quantized of compressed-tensors."""

    def pack(weight: np.ndarray) -> Packed:
        groups = group_numbers(weight.shape[1], group_size, shuffled=ordered)
        integers, zeros, scales = round_by_group(weight, groups, bits, symmetric=symmetric)
        tensors = {
            "weight_packed": pack_rows(integers, bits),
            "weight_scale": torch.from_numpy(scales).half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_rows(zeros.T, bits).T.contiguous()
        if ordered:
            tensors["weight_g_idx"] = torch.from_numpy(groups).int()
        return tensors, (integers - zeros[:, groups]) * scales[:, groups]

    return pack


def int8(*, symmetric: bool = True) -> Packer:
    """int-quantized of compressed-tensors, a scale for each output."""

    def pack(weight: np.ndarray) -> Packed:
        groups = group_numbers(weight.shape[1], -1)
        integers, zeros, scales = round_by_group(weight, groups, 8, symmetric=symmetric)
        tensors = {
            "weight": torch.from_numpy(integers - 128).to(torch.int8),
            "weight_scale": torch.from_numpy(scales).half(),
        }
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
        return tensors, (integers - zeros[:, groups]) * scales[:, groups]

    return pack


def quantize_checkpoint(
    path: Path, target: Path, config: dict[str, Any], pack: Packer, layers: Callable[[str], bool]
) -> Path:
    """Write the checkpoint `path` to `target` with the linear layers that `layers` chooses packed.

    `path` itself is left with the weights that they mean: what transformers loads from there is what `target` must do.
    """
    meant = load_file(path / "model.safetensors")
    stored = dict(meant)
    for name in sorted(meant):
        layer = name.removesuffix(".weight")
        if layer != name and layers(layer):
            tensors, meaning = pack(stored.pop(name).double().numpy())
            stored |= {f"{layer}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
            meant[name] = torch.from_numpy(meaning).float()
    target.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((path / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, path / "model.safetensors", metadata={"format": "pt"})
    return target
