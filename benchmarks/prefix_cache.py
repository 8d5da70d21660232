"""What the prefix cache gains with a hit, and what it costs without one: python benchmarks/prefix_cache.py [RUNS]

A random Llama of 30M parameters, in process, one thread pool. Hit: time to first token of prompts of 1,024 shared
tokens and 16 of their own; cold means that nothing of the prompt is cached. Cost: requests that share nothing, with
caching on and off in turn, through the scheduler alone (a stub executor) and through the whole engine.
"""

import logging
import statistics
import sys
import tempfile
import time

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trivium import LLM, SamplingParams, TokensPrompt
from trivium.config import ModelInfo
from trivium.inputs import EncodedPrompt
from trivium.scheduler.request import Request
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput, SchedulerOutput

PREFIX = 1024
OWN = 16
VOCAB_SIZE = 8192
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)

# Without a hit: requests a run, the tokens of their prompts and of their outputs.
NUM_STUBBED, NUM_SERVED = 128, 8
UNSHARED, OUTPUT = 512, 32
GENERATE = SamplingParams(temperature=0, max_tokens=OUTPUT, seed=0, ignore_eos=True, detokenize=False)


def save_model(path: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    vocabulary = {f"t{index}": index for index in range(VOCAB_SIZE)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))).save_pretrained(
        path
    )


def first_token_seconds(llm: LLM, seed: int, own: int) -> float:
    """Seconds for a prompt whose shared part is drawn from `seed` and whose own part from `own`."""
    shared = torch.randint(1, VOCAB_SIZE, (PREFIX,), generator=torch.Generator().manual_seed(seed)).tolist()
    tail = torch.randint(1, VOCAB_SIZE, (OWN,), generator=torch.Generator().manual_seed(own)).tolist()
    begin = time.perf_counter()
    llm.generate(TokensPrompt(prompt_token_ids=shared + tail), FIRST_TOKEN, use_tqdm=False)
    return time.perf_counter() - begin


def random_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return torch.randint(1, VOCAB_SIZE, (count, UNSHARED), generator=torch.Generator().manual_seed(seed)).tolist()


def scheduler_seconds(seed: int, *, enable_prefix_caching: bool) -> float:
    """Seconds that the scheduler takes for NUM_STUBBED requests, from their creation to their end."""
    info = ModelInfo(
        name="stub",
        architecture="stub",
        is_encoder_decoder=False,
        max_model_len=2048,
        max_encoder_len=0,
        vocab_size=VOCAB_SIZE,
        dtype="float32",
        block_size=16,
        num_blocks=4096,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )
    prompts = [EncodedPrompt(tuple(ids)) for ids in random_prompts(NUM_STUBBED, seed)]
    scheduler = Scheduler(info, enable_prefix_caching=enable_prefix_caching)
    left: dict[int, int] = {}  # slot -> prompt tokens that are left to compute
    begin = time.perf_counter()
    for key, prompt in enumerate(prompts):
        scheduler.add_request(Request(key, prompt, GENERATE, max_tokens=OUTPUT))
    seconds = time.perf_counter() - begin
    while True:
        begin = time.perf_counter()
        plan = scheduler.schedule()
        seconds += time.perf_counter() - begin
        if plan is None:
            return seconds
        output = stub_output(plan, left)
        begin = time.perf_counter()
        scheduler.update_from_output(output)
        seconds += time.perf_counter() - begin


def stub_output(plan: SchedulerOutput, left: dict[int, int]) -> ModelRunnerOutput:
    """Token 5 for every row whose prompt is computed."""
    for new in plan.new_requests:
        left[new.slot] = len(new.prompt_token_ids) - new.num_computed_tokens
    for slot, count in zip(plan.scheduled_slots, plan.num_scheduled_tokens, strict=True):
        left[slot] -= count
    slots = tuple(slot for slot in plan.scheduled_slots if left[slot] <= 0)
    return ModelRunnerOutput(plan.step, slots, (5,) * len(slots))


def engine_seconds(llm: LLM, seed: int) -> float:
    """Seconds for NUM_SERVED requests that share nothing with any before."""
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in random_prompts(NUM_SERVED, seed)]
    begin = time.perf_counter()
    llm.generate(prompts, GENERATE, use_tqdm=False)
    return time.perf_counter() - begin


def measure_hit(path: str, runs: int) -> None:
    with LLM(path, max_num_batched_tokens=2048) as llm:
        first_token_seconds(llm, 0, 0)
        cold, hit = [], []
        for run in range(1, runs + 1):
            cold.append(first_token_seconds(llm, run, 1000 + run))
            hit.append(first_token_seconds(llm, run, 2000 + run))
    ratio = statistics.median(hit) / statistics.median(cold)
    print(f"cold {1e3 * statistics.median(cold):.0f} ms, hit {1e3 * statistics.median(hit):.0f} ms, ratio {ratio:.3f}")


def measure_cost(path: str, runs: int) -> None:
    """Without a hit; each seed is new, and the side that goes first changes from run to run."""
    both = (True, False)
    scheduler: dict[bool, list[float]] = {True: [], False: []}  # caching -> seconds of each run
    engine: dict[bool, list[float]] = {True: [], False: []}
    with (
        LLM(path, max_num_batched_tokens=2048) as caching,
        LLM(path, max_num_batched_tokens=2048, enable_prefix_caching=False) as plain,
    ):
        for run in range(runs + 1):
            for enabled in both if run % 2 else both[::-1]:
                scheduler[enabled].append(scheduler_seconds(run, enable_prefix_caching=enabled))
                engine[enabled].append(engine_seconds(caching if enabled else plain, 3000 + run))
    for times in (scheduler, engine):
        for seconds in times.values():
            del seconds[0]  # warm-up
    on, off = (1e6 * statistics.median(scheduler[enabled]) / NUM_STUBBED for enabled in both)
    print(f"scheduler, no hit: {on:.0f} us a request with caching, {off:.0f} us without")
    on, off = (NUM_SERVED * OUTPUT / statistics.median(engine[enabled]) for enabled in both)
    spread = max(engine[False]) / min(engine[False]) - 1
    print(
        f"engine, no hit: {on:.1f} tokens/s with caching, {off:.1f} without, ratio {on / off:.3f}; noise {spread:.0%}"
    )
    extra = statistics.median(scheduler[True]) - statistics.median(scheduler[False])
    share = extra / NUM_STUBBED / (statistics.median(engine[False]) / NUM_SERVED)
    print(f"the scheduler's extra time is {share:.2%} of the engine's time for such a request")


def main(runs: int) -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as path:
        save_model(path)
        measure_hit(path, runs)
        measure_cost(path, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
