"""Decode steps of whole models on a GPU: against the least time that memory allows, and against transformers.

Weights are random, the shapes those of Llama 3.2 1B and Llama 3.1 8B, the latter also with its layers in int4 (AWQ) and
FP8; transformers has them in bfloat16 always. What a step takes is the time of many steps by
their number, with as many plans under way as a scheduler has; the time of the scheduler itself is not in it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import FOLDER, Shape
from machine import Sizes
from packed_models import AWQ, FP8, Packing, save_packed

from trivium.config import GPU_PLANS_IN_FLIGHT, ExecutorConfig
from trivium.executor.model_runner import ModelRunner
from trivium.params import SamplingParams
from trivium.step import CachedRequestData, NewRequestData, SchedulerOutput

HEADER = ("model", "rows", "context", "ms", "floor ms", "of the floor", "tokens/s", "transformers ms", "theirs / ours")
LOADS = ((1, 1024), (8, 1024), (32, 1024), (64, 1024))  # (rows, tokens of context)
_WEIGHT_BYTES = 2
_BLOCK_SIZE = 16
_PROMPT_CHUNK = 2048  # tokens of one step
_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def _llama(name: str, hidden: int, layers: int, width: int, head_dim: int, *, tied: bool) -> Shape:
    config = {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        **_IDS,
    }
    return Shape(name, "LlamaForCausalLM", "LlamaConfig", config, dtype=torch.bfloat16, is_encoder_decoder=False)


MODELS = {
    "1b": _llama("llama-1b-random", 2048, 16, 8192, 64, tied=True),
    "8b": _llama("llama-8b-random", 4096, 32, 14336, 128, tied=False),
}
# name -> (the model that it is, how its layers are stored)
PACKED: dict[str, tuple[str, Packing]] = {"8b-awq": ("8b", AWQ), "8b-fp8": ("8b", FP8)}
NAMES = (*MODELS, *PACKED)


@dataclass(frozen=True, slots=True)
class Load:
    rows: int
    context: int


def step_bytes(shape: Shape, load: Load, layer_bytes: float = _WEIGHT_BYTES) -> float:
    """The least that any way reads in a decode step: every weight once, and the keys and values of every row.

    layer_bytes: of a weight of the layers; the output layer has 16 bits.
    """
    config = shape.config
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * _WEIGHT_BYTES
    num_weights, num_outputs = Sizes.of(shape).num_weights, config["hidden_size"] * shape.vocab_size
    weights = (num_weights - num_outputs) * layer_bytes + num_outputs * _WEIGHT_BYTES
    return weights + load.rows * load.context * per_token


def least_seconds(
    shape: Shape, load: Load, bytes_per_s: float, flops_per_s: float, layer_bytes: float = _WEIGHT_BYTES
) -> float:
    memory = step_bytes(shape, load, layer_bytes) / bytes_per_s
    return max(memory, 2 * Sizes.of(shape).num_weights * load.rows / flops_per_s)


def table_cells(name: str, load: Load, seconds: float, least: float, theirs: float) -> list[str]:
    return [
        name,
        str(load.rows),
        str(load.context),
        f"{1e3 * seconds:.2f}",
        f"{1e3 * least:.2f}",
        f"{least / seconds:.0%}",
        f"{load.rows / seconds:.0f}",
        f"{1e3 * theirs:.2f}",
        f"{theirs / seconds:.2f}",
    ]


class Decoding:
    """Rows of one runner that decode: the plans that a scheduler would make, made as fast as a loop can.

    Rows have their whole contexts computed when this is made, and blocks for `num_steps` more tokens.
    """

    def __init__(self, runner: ModelRunner, load: Load, num_steps: int) -> None:
        self._runner = runner
        self._slots = tuple(range(load.rows))
        self._step = 0
        self._vocab_size = runner.model_info.vocab_size
        num_tokens = load.context + num_steps + 1
        self._blocks_per_row = -(-num_tokens // runner.model_info.block_size)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 1, ignore_eos=True)
        for slot in self._slots:
            self._compute_prompt(slot, load.context, sampling)

    def run(self, num_steps: int) -> int:
        """Decode, with plans ahead of results. Returns the tokens that came."""
        num_tokens, under_way = 0, deque(self._start() for _ in range(min(num_steps, GPU_PLANS_IN_FLIGHT)))
        for index in range(num_steps):
            num_tokens += len(under_way.popleft().result().token_ids)
            if index + GPU_PLANS_IN_FLIGHT < num_steps:
                under_way.append(self._start())
        return num_tokens

    def end(self) -> None:
        self._step += 1
        self._runner.execute(SchedulerOutput(self._step, freed_slots=self._slots))

    def _start(self) -> Any:
        self._step += 1
        return self._runner.start(SchedulerOutput(self._step, self._slots, (1,) * len(self._slots)))

    def _compute_prompt(self, slot: int, length: int, sampling: SamplingParams) -> None:
        first = slot * self._blocks_per_row
        new: tuple[NewRequestData, ...] = (
            NewRequestData(
                slot=slot,
                prompt_token_ids=tuple((slot + 7 * index) % (self._vocab_size - 2) + 2 for index in range(length)),
                output_token_ids=(),
                num_computed_tokens=0,
                block_ids=tuple(range(first, first + self._blocks_per_row)),
                sampling=sampling,
                choice_index=0,
                max_tokens=sampling.max_tokens or 1,
            ),
        )
        for start in range(0, length, _PROMPT_CHUNK):
            self._step += 1
            count = min(_PROMPT_CHUNK, length - start)
            self._runner.execute(SchedulerOutput(self._step, (slot,), (count,), new, CachedRequestData()))
            new = ()


def decode_seconds(
    runner: ModelRunner, load: Load, *, num_steps: int, runs: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of one step: the median of `runs` times `num_steps` steps. The first run, which records graphs, is not timed."""
    decoding = Decoding(runner, load, (runs + 1) * num_steps)
    decoding.run(num_steps)
    seconds = []
    for _ in range(runs):
        begin = clock()
        num_tokens = decoding.run(num_steps)
        seconds.append((clock() - begin) / num_steps)
        assert num_tokens == num_steps * load.rows, f"{num_tokens} tokens of {num_steps} steps of {load.rows} rows"
    decoding.end()
    return statistics.median(seconds)


def measure_models(names: Sequence[str], bytes_per_s: float, flops_per_s: float, runs: int) -> Iterator[list[str]]:
    """The cells of each line. Needs a GPU."""
    loads = [Load(*load) for load in LOADS]
    theirs: dict[str, dict[Load, float]] = {}  # of a model in bfloat16
    for name in names:
        base, packing = PACKED.get(name, (name, None))
        shape, layer_bytes = MODELS[base], _WEIGHT_BYTES if packing is None else packing.layer_bytes
        if base not in theirs:
            theirs[base] = _save_and_measure_transformers(shape, loads, runs)
        directory = FOLDER / shape.name
        if packing is not None:
            directory = save_packed(shape, packing, FOLDER / f"{shape.name}-{packing.quantization['quant_method']}")
        runner = ModelRunner(_config(directory, loads))
        for load in loads:
            seconds = decode_seconds(runner, load, num_steps=32, runs=runs)
            least = least_seconds(shape, load, bytes_per_s, flops_per_s, layer_bytes)
            yield table_cells(directory.name, load, seconds, least, theirs[base][load])
        runner.close()
        del runner
        _free_memory()


def _config(directory: Path, loads: Sequence[Load]) -> ExecutorConfig:
    return ExecutorConfig(
        model=str(directory),
        served_model_name=directory.name,
        device="cuda",
        block_size=_BLOCK_SIZE,
        max_num_seqs=max(load.rows for load in loads),
        max_num_batched_tokens=_PROMPT_CHUNK,
    )


def _save_and_measure_transformers(shape: Shape, loads: Sequence[Load], runs: int) -> dict[Load, float]:
    """What a step takes in transformers, having saved the checkpoint if it was not there."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape.config)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    directory = FOLDER / shape.name
    if not (directory / "config.json").exists():
        model.save_pretrained(directory)
    seconds = {load: _transformers_seconds(model, load, runs) for load in loads}
    del model
    _free_memory()
    return seconds


@torch.inference_mode()
def _transformers_seconds(model: Any, load: Load, runs: int, num_steps: int = 16) -> float:
    """Decode steps as `generate` makes them, with its default cache and attention, without its search for the end."""
    ids = torch.randint(2, model.config.vocab_size, (load.rows, load.context), device="cuda")
    cache = transformers.DynamicCache(config=model.config)
    for rows in range(0, load.context, _PROMPT_CHUNK // load.rows):
        part = ids[:, rows : rows + _PROMPT_CHUNK // load.rows]
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    seconds = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(num_steps):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / num_steps)
    return statistics.median(seconds[1:])


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
