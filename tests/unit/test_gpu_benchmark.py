"""What the benchmark of models on a GPU can be asked without one: its shapes, its floors, its plans and its table."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_tiny
from trivium.config import ExecutorConfig
from trivium.executor.gpu_linear import ByteProduct, Int4Product
from trivium.executor.linear import find_linears
from trivium.executor.model_runner import ModelRunner
from trivium.executor.platform import Platform
from trivium_kernels.dispatch import torch_kernels

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_models

    yield gpu_models
    for name in ("gpu_models", "gpu", "checkpoints", "machine", "packed_models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "rows", "least_ms"),
    [("1b", 1, 0.58), ("1b", 32, 0.82), ("1b", 64, 1.07), ("8b", 1, 3.51), ("8b", 32, 4.49), ("8b", 64, 5.49)],
)
def test_floors_are_bytes_over_bandwidth(gpu_models: Any, name: str, rows: int, least_ms: float) -> None:
    """By hand, of Llama 3.2 1B and Llama 3.1 8B in 16 bits with 1,024 tokens a row, at 4.3 TB/s and 790 TFLOP/s."""
    load = gpu_models.Load(rows, 1024)
    seconds = gpu_models.least_seconds(gpu_models.MODELS[name], load, 4.3e12, 790e12)
    assert 1e3 * seconds == pytest.approx(least_ms, abs=0.025)


@pytest.mark.parametrize(("name", "least_ms"), [("8b-awq", 1.13), ("8b-fp8", 1.90)])
def test_floors_of_packed_layers_are_those_of_their_bytes(gpu_models: Any, name: str, least_ms: float) -> None:
    """By hand: 6.98e9 weights in 0.523 bytes or in one, 0.525e9 of the output layer and 131 KiB a token in two."""
    base, packing = gpu_models.PACKED[name]
    shape, load = gpu_models.MODELS[base], gpu_models.Load(1, 1024)
    seconds = gpu_models.least_seconds(shape, load, 4.3e12, 790e12, packing.layer_bytes)
    assert 1e3 * seconds == pytest.approx(least_ms, abs=0.025)


@pytest.mark.parametrize("name", ["8b-awq", "8b-fp8"])
def test_its_packed_checkpoints_run(gpu_models: Any, name: str, tmp_path: Path) -> None:
    base, packing = gpu_models.PACKED[name]
    small = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    shape = replace(gpu_models.MODELS[base], config={**gpu_models.MODELS[base].config, **small, **heads})
    config = ExecutorConfig(
        model=str(gpu_models.save_packed(shape, packing, tmp_path / "m")),
        served_model_name="m",
        device="cpu",
        max_num_seqs=2,
        max_model_len=64,
        kv_cache_memory_bytes=2**21,
    )
    platform = Platform(torch.device("cpu"), torch.float32, torch_kernels(), is_gpu=True)
    runner = ModelRunner(config, choose=lambda *_: platform)
    assert gpu_models.decode_seconds(runner, gpu_models.Load(2, 20), num_steps=4, runs=1) > 0
    products = [linear.product for linear in find_linears(runner._model.decoder)]
    assert sum(isinstance(product, (Int4Product, ByteProduct)) for product in products) == 4


def test_its_names_are_those_of_the_models(gpu_models: Any) -> None:
    import gpu

    assert gpu.MODELS == gpu_models.NAMES


def test_arithmetic_is_the_floor_where_it_takes_longer(gpu_models: Any) -> None:
    shape, load = gpu_models.MODELS["1b"], gpu_models.Load(1000, 1)
    assert gpu_models.least_seconds(shape, load, 1e18, 1e12) == pytest.approx(2 * 1.236e9 * 1000 / 1e12, rel=1e-3)


def test_a_line_of_the_table(gpu_models: Any) -> None:
    cells = gpu_models.table_cells("m", gpu_models.Load(8, 1024), 0.002, 0.001, 0.005)
    assert dict(zip(gpu_models.HEADER, cells, strict=True)) == {
        "model": "m",
        "rows": "8",
        "context": "1024",
        "ms": "2.00",
        "floor ms": "1.00",
        "of the floor": "50%",
        "tokens/s": "4000",
        "transformers ms": "5.00",
        "theirs / ours": "2.50",
    }


def test_its_plans_run(gpu_models: Any, tmp_path: Path) -> None:
    """On a real runner, with a clock that counts: the median of the runs but the first, by the steps of a run."""
    config = ExecutorConfig(
        model=str(save_tiny("llama", tmp_path)),
        served_model_name="m",
        device="cpu",
        max_num_seqs=3,
        max_model_len=120,
        kv_cache_memory_bytes=2**21,
    )
    runner = ModelRunner(config)
    ticks = count()
    seconds = gpu_models.decode_seconds(
        runner, gpu_models.Load(3, 40), num_steps=6, runs=2, clock=lambda: 3.0 * next(ticks)
    )
    assert seconds == 0.5
    assert runner.num_occupied_slots == 0


@pytest.mark.parametrize(
    ("only", "models", "num_ops", "wanted"),
    [
        (None, None, None, ("1b", "8b", "8b-awq", "8b-fp8")),
        (["rms_norm"], None, 1, ()),
        (None, ["1b"], 0, ("1b",)),
        (None, [], 0, ("1b", "8b", "8b-awq", "8b-fp8")),
        (["rms_norm"], ["8b"], 1, ("8b",)),
    ],
)
def test_what_is_not_named_is_left_out(
    gpu_models: Any, only: list[str] | None, models: list[str] | None, num_ops: int | None, wanted: tuple[str, ...]
) -> None:
    import gpu

    ops, found = gpu.what_to_measure(only, models)
    assert len(ops) == (len(gpu.OPS) if num_ops is None else num_ops)
    assert found == wanted
