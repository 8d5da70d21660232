"""A model that is split over ranks says what it says whole, every family; here the ranks are threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

import packers
from adapters import save_adapter, targets_of
from embeds import packed, soft_rows
from packers import quantize_checkpoint
from ranks import ThreadedRunner, ThreadRanks
from soft_prompts import save_soft_prompt
from tiny import BART_LIKE, T5_LIKE, load_oracle, save_model, save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium.config import AdapterModule, ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor import layer_products
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import read_json
from trivium.executor.model_runner import ModelRunner
from trivium.executor.models.registry import find_architecture
from trivium.executor.parallel.shard import Shard
from trivium.pooling import PoolingType
from trivium_kernels.dispatch import select_kernels
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import TOLERANCE, add_random_requests, assert_same, outputs_of, random_ids

FAMILIES = (*DECODER_BUILDERS, *BART_LIKE, *T5_LIKE)
# What more than two ranks need beside an even number of heads, and where key heads are fewer than ranks.
MORE_RANKS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 3, {"num_key_value_heads": 3, "intermediate_size": 57}),
    ("llama", 6, {"intermediate_size": 60}),  # a key head has three ranks
    ("phi3", 6, {"intermediate_size": 60}),
    ("olmo2", 6, {"intermediate_size": 60}),
    ("stablelm", 6, {"intermediate_size": 60, "qk_layernorm": True}),
    ("gpt2", 3, {"n_inner": 57}),
    ("falcon", 3, {}),  # one key head for all
    ("falcon", 3, {"new_decoder_architecture": True, "num_kv_heads": 3}),
    ("qwen2_moe", 6, {"intermediate_size": 60, "shared_expert_intermediate_size": 42}),
    ("t5_gated", 4, {}),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, ThreadRanks]]:
    """Number of ranks -> threads."""
    found = {size: ThreadRanks(size) for size in (2, 3, 4, 6)}
    yield found
    for each in found.values():
        each.close()


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Packing the weights of dozens of models would take most of the time."""
    if "tuned" not in request.fixturenames:
        monkeypatch.setattr(layer_products, "tune", lambda *arguments, **settings: None)


@pytest.fixture
def tuned() -> None:
    """For the tests that want it as it is."""


def make_config(path: Path, **settings: Any) -> ExecutorConfig:
    defaults: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_memory_bytes": 8 * 2**20, "block_size": 4}
    return ExecutorConfig(model=str(path), served_model_name="tiny", num_threads=1, **{**defaults, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(family: str, ranks: dict[int, ThreadRanks], tmp_path: Path) -> None:
    config = make_config(save_tiny(family, tmp_path))
    assert_same(outputs_of(ThreadedRunner(ranks[2], config)), outputs_of(ModelRunner(config)))


@pytest.mark.parametrize(("family", "size", "overrides"), MORE_RANKS, ids=str)
def test_more_ranks_say_the_same(
    family: str, size: int, overrides: dict[str, Any], ranks: dict[int, ThreadRanks], tmp_path: Path
) -> None:
    config = make_config(save_tiny(family, tmp_path, **overrides))
    assert_same(outputs_of(ThreadedRunner(ranks[size], config)), outputs_of(ModelRunner(config)))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_packed_weights_say_the_same(family: str, ranks: dict[int, ThreadRanks], tmp_path: Path, tuned: None) -> None:
    config = make_config(save_tiny(family, tmp_path))
    assert_same(outputs_of(ThreadedRunner(ranks[2], config)), outputs_of(ModelRunner(config)))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bart", "t5_gated"])
def test_adapters_are_split_with_their_layers(family: str, ranks: dict[int, ThreadRanks], tmp_path: Path) -> None:
    checkpoint, targets = save_tiny(family, tmp_path / "model"), targets_of(family)
    adapter = save_adapter(checkpoint, tmp_path / "all", targets)
    module = AdapterModule("some", str(save_adapter(checkpoint, tmp_path / "some", (targets[0], targets[-1]), seed=1)))
    config = make_config(checkpoint, enable_lora=True, lora_modules=(module,))

    def say(runner: Any) -> list[list[int]]:
        runner.load_adapter("all", str(adapter))
        scheduler = MiniScheduler(runner, chunk=7)
        requests = add_random_requests(scheduler, 4)
        for request, name in zip(requests, ("", "all", "some", "all"), strict=True):
            request.adapter = name
        scheduler.run()
        return [request.output for request in requests]

    assert say(ThreadedRunner(ranks[2], config)) == say(ModelRunner(config))


@pytest.mark.parametrize(
    ("family", "size", "overrides"),
    [
        ("llama", 2, {}),
        ("llama", 6, {"intermediate_size": 60}),  # a key head has three ranks
        ("bart", 2, {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
        ("t5", 2, {"d_kv": 8, "num_decoder_layers": 3}),
    ],
    ids=str,
)
def test_soft_prompts_are_split_with_the_heads(
    family: str, size: int, overrides: dict[str, Any], ranks: dict[int, ThreadRanks], tmp_path: Path
) -> None:
    checkpoint = save_tiny(family, tmp_path / "model", **overrides)
    prefix = save_soft_prompt(checkpoint, tmp_path / "prefix", "prefix")
    module = AdapterModule("prompt", str(save_soft_prompt(checkpoint, tmp_path / "prompt")))
    config = make_config(checkpoint, enable_prompt_adapter=True, prompt_adapters=(module,))

    def say(runner: Any) -> list[list[int]]:
        adapters = {each.name: each for each in runner.model_info.prompt_adapters}
        adapters["prefix"] = runner.load_prompt_adapter("prefix", str(prefix))
        with pytest.raises(ConfigurationError, match="broken"):
            runner.load_prompt_adapter("broken", str(checkpoint))
        scheduler = MiniScheduler(runner, chunk=7)
        requests = [
            scheduler.add([2], encoder=tuple(random_ids(9, seed=seed)), prompt_adapter=adapters.get(name))
            if runner.model_info.is_encoder_decoder
            else scheduler.add(random_ids(9, seed=seed), prompt_adapter=adapters.get(name))
            for seed, name in enumerate(("", "prompt", "prefix", "prefix"))
        ]
        scheduler.run()
        return [request.output for request in requests]

    assert say(ThreadedRunner(ranks[size], config)) == say(ModelRunner(config))


@pytest.mark.parametrize("packing", ["gptq", "awq", "fp8"])
def test_packed_checkpoints_are_unpacked_and_then_split(
    packing: str, ranks: dict[int, ThreadRanks], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4}
    meant = save_tiny("llama", tmp_path / "meant", **sizes)
    settings: dict[str, Any]
    settings, pack = {
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, packers.gptq()),
        "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}, packers.awq()),
        "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, packers.fp8()),
    }[packing]
    stored = quantize_checkpoint(meant, tmp_path / "stored", settings, pack, lambda name: "_proj" in name)
    expected = outputs_of(ModelRunner(make_config(meant)))
    assert_same(outputs_of(ThreadedRunner(ranks[2], make_config(stored))), expected)


@pytest.mark.parametrize("family", ["llama", "t5_gated"])
def test_vectors_are_those_of_one_rank(family: str, ranks: dict[int, ThreadRanks], tmp_path: Path) -> None:
    config = make_config(save_tiny(family, tmp_path))
    prompts = [random_ids(5), random_ids(30, seed=1)]
    for kind in (PoolingType.LAST, PoolingType.ALL):
        found = ThreadedRunner(ranks[2], config).embed(prompts, kind, normalize=kind is PoolingType.LAST)
        expected = ModelRunner(config).embed(prompts, kind, normalize=kind is PoolingType.LAST)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_prompts_of_embeddings_reach_every_rank(family: str, ranks: dict[int, ThreadRanks], tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    embeds = packed(soft_rows(load_oracle(path), random_ids(12)))

    def say(runner: Any) -> list[int]:
        scheduler = MiniScheduler(runner, chunk=5)
        if scheduler.info.is_encoder_decoder:
            request = scheduler.add([2], encoder=embeds.placeholder_ids, encoder_embeds=embeds)
        else:
            request = scheduler.add(list(embeds.placeholder_ids), embeds=embeds)
        scheduler.run()
        return request.output

    config = make_config(path)
    assert say(ThreadedRunner(ranks[2], config)) == say(ModelRunner(config))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
def test_a_rank_reads_its_part_of_the_weights(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    model_json = read_json(path / "config.json")
    build = find_architecture(model_json).build

    def loaded_bytes(shard: Shard) -> int:
        with Checkpoint(path, shard=shard) as checkpoint:
            build(model_json, checkpoint, select_kernels(torch.device("cpu")))
            return checkpoint.loaded_bytes

    whole = loaded_bytes(Shard())
    parts = [loaded_bytes(Shard(_Place(rank, 2))) for rank in range(2)]
    replicated = sum(parts) - whole  # norms, positions
    assert 0 < replicated < 0.2 * whole
    assert max(parts) < 0.65 * whole


def test_the_pool_of_a_rank_has_its_heads_only_and_all_have_as_many_blocks(
    ranks: dict[int, ThreadRanks], tmp_path: Path
) -> None:
    config = make_config(save_tiny("llama", tmp_path), swap_space_gib=2**-10)
    split, whole = ThreadedRunner(ranks[2], config), ModelRunner(config)
    assert split.model_info.num_blocks == 2 * whole.model_info.num_blocks
    assert split.model_info.num_host_blocks == 2 * whole.model_info.num_host_blocks
    assert all(runner.kv_pool_bytes == whole.kv_pool_bytes for runner in split.runners)


def test_the_rank_that_can_hold_least_decides(
    ranks: dict[int, ThreadRanks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter((2**24, 2**22))  # bytes, whoever asks first
    monkeypatch.setattr("trivium.executor.limits.available_memory_bytes", lambda: next(free))
    config = make_config(save_tiny("llama", tmp_path), kv_cache_memory_bytes=None, max_num_seqs=64)
    runner = ThreadedRunner(ranks[2], config)  # compares what the ranks say
    block_bytes = runner.runners[0].kv_pool_bytes // runner.model_info.num_blocks
    assert runner.model_info.num_blocks == int(2**22 // 2 * 0.2) // block_bytes


@pytest.mark.parametrize(
    ("family", "size", "overrides", "message"),
    [
        ("llama", 4, {}, "tensor_parallel_size 4 does not divide the model's 6 attention heads"),
        ("llama", 3, {}, "tensor_parallel_size 3 is not a multiple of the model's 2 key heads"),
        ("llama", 2, {"num_key_value_heads": 3}, "tensor_parallel_size 2 does not divide the model's 3 key heads"),
        ("llama", 2, {"intermediate_size": 57}, "tensor_parallel_size 2 does not divide the model's 57 feed-forward"),
        ("bart", 4, {}, "tensor_parallel_size 4 does not divide the model's 2 attention heads"),
        ("bart", 2, {"decoder_ffn_dim": 55}, "tensor_parallel_size 2 does not divide the model's 55 feed-forward"),
        ("t5", 3, {}, "tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        ("qwen3_moe", 2, {"moe_intermediate_size": 23}, "does not divide the model's 23 feed-forward columns"),
        ("t5", 4, {"vocab_size": 90}, "tensor_parallel_size 4 is too large for a vocabulary of 90 tokens"),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_numbers(
    family: str, size: int, overrides: dict[str, Any], message: str, ranks: dict[int, ThreadRanks], tmp_path: Path
) -> None:
    path = save_tiny(family, tmp_path, **overrides)
    with pytest.raises(ConfigurationError, match=message):
        ThreadedRunner(ranks[size], make_config(path))


def test_a_model_that_runs_in_transformers_is_refused_by_its_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    save_model(CohereForCausalLM(CohereConfig(vocab_size=96, **sizes)), tmp_path)
    model_json = read_json(tmp_path / "config.json")
    with (
        Checkpoint(tmp_path, shard=Shard(_Place(0, 2))) as checkpoint,
        pytest.raises(ConfigurationError, match=r"CohereForCausalLM cannot run here: .*tensor_parallel_size 2"),
    ):
        find_architecture(model_json).build(model_json, checkpoint, select_kernels(torch.device("cpu")))


class _Place:
    """A communicator for loading, which exchanges nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("loading exchanges nothing")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("loading exchanges nothing")
