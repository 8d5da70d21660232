"""Models whose weights stay packed, as on a GPU, with the operators of plain torch: they say what their weights mean.

The same with Triton's operators, in its interpreter, is in `tests/gpu_path`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import save_adapter, targets_of
from packers import Packed, Packer, quantize_checkpoint
from quantized_checkpoints import FORMATS, is_linear, quantized
from ranks import ThreadedRunner, ThreadRanks
from tiny import load_oracle, save_tiny
from trivium.config import AdapterModule, ExecutorConfig
from trivium.executor.gpu_linear import ByteProduct, Int4Product, StackedProduct
from trivium.executor.layer_products import choose_packer
from trivium.executor.linear import Linear, find_linears
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import read_json
from trivium.executor.model_runner import ModelRunner
from trivium.executor.models.registry import find_architecture
from trivium.executor.platform import Platform
from trivium.executor.quantization.config import read_quantization
from trivium_kernels.dispatch import torch_kernels
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests, assert_same, generate, outputs_of

CPU = torch.device("cpu")
PLATFORM = Platform(CPU, torch.float32, torch_kernels(), is_gpu=True)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "mixtral": (*ATTENTION, "w1", "w2", "w3"),
    "qwen2_moe": GATED,
    "gemma2": GATED,
}
RUNS = [
    *product(("llama", "phi3", "falcon", "gpt2", "mixtral", "bart", "t5_gated"), ("gptq-own-order", "fp8-tensor")),
    *product(("llama", "qwen2_moe"), ("awq-32", "fp8-block")),
    *product(("gemma2", "bart"), ("gptq-2bit", "ct-int8")),
]
SPLIT_RUNS = [
    *product(("llama",), ("awq-32", "gptq-own-order", "gptq-32", "fp8-channel", "fp8-tensor")),
    *product(("falcon", "bart"), ("gptq-own-order", "fp8-channel")),
]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(2)
    yield ranks
    ranks.close()


def make_config(path: Path, **settings: Any) -> ExecutorConfig:
    defaults: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_memory_bytes": 8 * 2**20, "block_size": 4}
    return ExecutorConfig(model=str(path), served_model_name="tiny", num_threads=1, **{**defaults, **settings})


def make_runner(path: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(make_config(path, **settings), choose=lambda *_: PLATFORM)


def linears_of(runner: ModelRunner) -> list[Linear]:
    return find_linears((runner._model.decoder, runner._model.encoder))


def kinds(linears: list[Linear]) -> Counter[str]:
    return Counter(type(linear.product).__name__ for linear in linears)


def transposed(pack: Packer) -> Packer:
    """For layers that are stored as [in, out] while they are floats."""

    def packed(weight: np.ndarray) -> Packed:
        tensors, meaning = pack(weight.T)
        return tensors, meaning.T.copy()

    return packed


def targets(family: str) -> Callable[[str], bool]:
    names = TARGETS.get(family) or targets_of(family)
    return lambda layer: layer.rpartition(".")[2] in names


def assert_says_what_its_weights_mean(runner: Any, meant: Path) -> None:
    oracle, scheduler = load_oracle(meant), MiniScheduler(runner)
    requests = add_random_requests(scheduler, 3)
    scheduler.run()
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


@pytest.mark.parametrize(("family", "form"), RUNS)
def test_every_kind_of_graph_runs_packed(family: str, form: str, tmp_path: Path) -> None:
    config, pack = FORMATS[form]
    meant = save_tiny(family, tmp_path / "meant")
    pack = transposed(pack) if family == "gpt2" else pack
    runner = make_runner(quantize_checkpoint(meant, tmp_path / "q", config, pack, targets(family)))
    assert_says_what_its_weights_mean(runner, meant)
    found = kinds(linears_of(runner))
    expected = {"fp8-tensor": "ByteProduct", "ct-int8": "ByteProduct", "fp8-block": "FloatProduct"}
    assert found[expected.get(form, "Int4Product")] >= 2
    if form == "gptq-own-order":
        stacks = [linear.product for linear in linears_of(runner) if isinstance(linear.product, StackedProduct)]
        assert bool(stacks) == (family not in ("phi3", "falcon", "gpt2"))  # which store what they stack as one layer
        assert all(isinstance(part, Int4Product) for stack in stacks for part in stack.parts)
    else:
        assert "StackedProduct" not in found


@pytest.mark.parametrize("form", ["fp8-block-128", "gptq-8bit-128"])
def test_scales_of_128_inputs_stay_with_their_bytes(form: str, two_ranks: ThreadRanks, tmp_path: Path) -> None:
    """On two ranks, too, of which the second has inputs that begin within a block, and so a layer of floats."""
    path, meant = quantized("llama", form, tmp_path, hidden_size=144, intermediate_size=200, initializer_range=0.15)
    runner = make_runner(path)
    assert_says_what_its_weights_mean(runner, meant)
    linears = linears_of(runner)
    assert set(kinds([linear for linear in linears if linear.shape[0] != 260])) == {"ByteProduct"}
    split = ThreadedRunner(two_ranks, make_config(path), PLATFORM)
    assert_says_what_its_weights_mean(split, meant)
    assert kinds(linears_of(split.runners[1]))["FloatProduct"] >= 1


@pytest.mark.parametrize("form", ["gptq-32", "fp8-channel"])
def test_an_output_layer_that_is_stored_packed_stays_so(form: str, tmp_path: Path) -> None:
    path, meant = quantized("llama", form, tmp_path, lambda layer: is_linear(layer) or layer == "lm_head")
    runner = make_runner(path)
    assert_says_what_its_weights_mean(runner, meant)
    assert len(kinds(linears_of(runner))) == 1


def test_layers_that_are_not_converted_keep_their_places(tmp_path: Path) -> None:
    skipped = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    path, meant = quantized("llama", "awq-32", tmp_path, lambda layer: is_linear(layer) and layer not in skipped)
    runner = make_runner(path)
    assert_says_what_its_weights_mean(runner, meant)
    assert kinds(linears_of(runner))["StackedProduct"] == 2


@pytest.mark.parametrize(("form", "at_most"), [("awq-32", 0.3), ("gptq-own-order", 0.45), ("fp8-tensor", 0.3)])
def test_what_is_counted_is_what_is_packed(form: str, at_most: float, tmp_path: Path) -> None:
    """Of a model of wide layers in float32; groups of 16 or 32 inputs have many scales."""
    path, _ = quantized(
        "llama", form, tmp_path, hidden_size=192, intermediate_size=256, num_hidden_layers=1, vocab_size=260
    )
    model_json = read_json(path / "config.json")

    def loaded_bytes(**settings: Any) -> int:
        packer = choose_packer(make_config(path, **settings), PLATFORM)
        quantization = read_quantization(model_json, path)
        with Checkpoint(path, quantization, packer=packer) as checkpoint:
            model = find_architecture(model_json).build(model_json, checkpoint, PLATFORM.kernels)
            linears = find_linears(model.decoder)
            counted = sum(num_bytes(linear) for linear in linears)
            embeddings_and_norms = 2 * 260 * 192 * 4 + 3 * 192 * 4
            assert checkpoint.loaded_bytes == counted + embeddings_and_norms
            return counted

    assert loaded_bytes() < at_most * loaded_bytes(quantization="int8")


def num_bytes(linear: Linear) -> int:
    """Of a layer in the decoder's blocks; the output layer is counted with the embedding."""
    match linear.product:
        case Int4Product(weight=weight):
            return weight.num_bytes
        case ByteProduct(weight=weight):
            return weight.values.nbytes + weight.scales.nbytes
        case StackedProduct(parts=parts):
            return sum(part.weight.num_bytes for part in parts if isinstance(part, Int4Product))
    assert isinstance(linear.weight, torch.Tensor)
    return 0 if linear.shape[0] == 260 else linear.weight.nbytes


@pytest.mark.parametrize("form", ["gptq-own-order", "fp8-tensor"])
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_adapters_add_to_packed_layers(family: str, form: str, tmp_path: Path) -> None:
    path, meant = quantized(family, form, tmp_path)
    adapter = save_adapter(meant, tmp_path / "adapter", targets_of(family))
    settings: dict[str, Any] = {"enable_lora": True, "lora_modules": (AdapterModule("a", str(adapter)),)}
    found = []
    for runner in (make_runner(path, **settings), ModelRunner(make_config(meant, **settings))):
        scheduler = MiniScheduler(runner)
        requests = add_random_requests(scheduler, 3)
        requests[1].adapter = requests[2].adapter = "a"
        scheduler.run()
        found.append([request.output for request in requests])
    assert found[0] == found[1]


@pytest.mark.parametrize(("family", "form"), SPLIT_RUNS)
def test_ranks_pack_their_parts(family: str, form: str, two_ranks: ThreadRanks, tmp_path: Path) -> None:
    config, pack = FORMATS[form]
    meant = save_tiny(family, tmp_path / "meant")
    path = quantize_checkpoint(meant, tmp_path / "q", config, pack, targets(family))
    runner = ThreadedRunner(two_ranks, make_config(path), PLATFORM)
    assert_same(outputs_of(runner), outputs_of(ModelRunner(make_config(meant))))
    assert set(kinds(linears_of(runner.runners[1]))) & {"Int4Product", "ByteProduct"}


@pytest.mark.parametrize("form", ["awq-32", "fp8-tensor"])
def test_packed_weights_become_int8_where_all_shall_be(form: str, tmp_path: Path) -> None:
    path, _ = quantized("llama", form, tmp_path)
    linears = linears_of(make_runner(path, quantization="int8"))
    products = [linear.product for linear in linears]
    assert all(isinstance(each, ByteProduct) and each.weight.values.dtype == torch.int8 for each in products)


def test_a_format_that_is_named_stays_packed(tmp_path: Path) -> None:
    path, _ = quantized("llama", "awq-32", tmp_path)
    assert kinds(linears_of(make_runner(path, quantization="awq")))["Int4Product"] >= 2


def test_on_a_cpu_nothing_of_this_is_used(tmp_path: Path) -> None:
    path, _ = quantized("llama", "awq-32", tmp_path)
    assert not set(kinds(linears_of(ModelRunner(make_config(path))))) & {"Int4Product", "StackedProduct"}
