"""Random timelines with real models: whatever happened meanwhile, a request has the tokens that it has alone.

Scheduler and ModelRunner, tiny checkpoints, and room for a fraction of the load. `make soak` runs a thousand.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tiny import ENCODER_DECODER, NUM_SPECIAL, VOCAB_SIZE, save_tiny
from trivium.config import ExecutorConfig, ModelInfo
from trivium.executor.model_runner import ModelRunner
from trivium.inputs import EncodedPrompt
from trivium.outputs import FinishReason
from trivium.params import SamplingParams
from trivium.scheduler.request import Request
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput

NUM_TRACES = int(os.environ.get("TRIVIUM_SOAK_TRACES", "50"))
TESTED = ("llama", "mistral", "bart", "t5")
BLOCK_SIZE = 4
NUM_BLOCKS_ALONE = 32


class World:
    """A scheduler with up to `depth` plans in flight, and an empty batch of `runner`."""

    def __init__(self, runner: ModelRunner, info: ModelInfo, *, depth: int = 1) -> None:
        self.runner = runner
        self.scheduler = Scheduler(info)
        self._depth = depth
        self._results: deque[ModelRunnerOutput] = deque()
        runner.reset()

    def step(self) -> bool:
        """Fill the pipeline and apply one result. False if there was nothing to do."""
        while len(self._results) < self._depth and (plan := self.scheduler.schedule()) is not None:
            self._results.append(self.runner.execute(plan))
            self.runner.check_invariants()
        if not self._results:
            return False
        self.scheduler.update_from_output(self._results.popleft())
        self.scheduler.check_invariants()
        return True

    def run(self) -> None:
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def lose_executor(self, fresh: ModelRunner) -> None:
        self.runner = fresh
        self._results.clear()
        self.scheduler.requeue_all()


@dataclass(frozen=True)
class Ask:
    """What a client asks for."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    max_tokens: int
    cache_salt: str
    priority: int

    def choice(self, key: int, index: int) -> Request:
        return Request(
            key,
            self.prompt,
            self.sampling,
            max_tokens=self.max_tokens,
            choice_index=index,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )


def random_ask(rng: random.Random, prefixes: list[tuple[int, ...]], *, has_encoder: bool) -> Ask:
    """Greedy or seeded, with a prefix that others have too."""
    tail = tuple(rng.randrange(NUM_SPECIAL, VOCAB_SIZE) for _ in range(rng.randint(1, 4)))
    encoder = rng.choice(prefixes)[: rng.choice((3, 7, 12))] if has_encoder else None
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0)),
        top_k=rng.choice((0, 20)),
        top_p=rng.choice((1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
        seed=rng.randrange(2**32),
        ignore_eos=rng.random() < 0.5,
        min_tokens=rng.choice((0, 2)),
        max_tokens=18,
    )
    return Ask(
        EncodedPrompt(rng.choice(prefixes)[: rng.randint(0, 12)] + tail, encoder_token_ids=encoder),
        sampling,
        max_tokens=rng.randint(2, 18),
        cache_salt=rng.choice(("", "", "a")),
        priority=rng.randint(0, 2),
    )


def play(config: ExecutorConfig, runner: ModelRunner, seed: int) -> Counter[str]:
    """One timeline, checked. What happened in it, by kind."""
    rng = random.Random(seed)
    info = replace(
        runner.model_info,
        num_blocks=rng.randint(12, 24),
        max_num_seqs=rng.randint(2, 6),
        max_num_batched_tokens=rng.randint(6, 32),
    )
    # The same blocks at several places, after different histories.
    a, b, c = (tuple(rng.randrange(NUM_SPECIAL, VOCAB_SIZE) for _ in range(BLOCK_SIZE)) for _ in range(3))
    prefixes = [a + b + c, b + a + c, c + b + a]
    world = World(runner, info, depth=rng.randint(1, 3))
    scheduler, choices, asks = world.scheduler, list[Request](), list[Ask]()
    for _ in range(11):
        ask = random_ask(rng, prefixes, has_encoder=info.is_encoder_decoder)
        group = [ask.choice(len(choices) + index, index) for index in range(rng.choice((1, 1, 1, 2)))]
        scheduler.check_admission(group[0])
        scheduler.add_choices(group)
        choices += group
        asks += [ask] * len(group)
        for _ in range(rng.randint(0, 3)):
            world.step()
        if rng.random() < 0.2:
            scheduler.finish(rng.choice(choices), FinishReason.ABORT)
        if rng.random() < 0.05:
            world.lose_executor(ModelRunner(config))
    world.run()
    assert scheduler.num_held_blocks == 0
    for choice, ask in zip(choices, asks, strict=True):
        expected = tokens_alone(runner, ask, choice.choice_index)
        if choice.finish_reason is FinishReason.ABORT:
            expected = expected[: len(choice.output_token_ids)]
        assert choice.output_token_ids == expected, f"timeline {seed}, choice {choice.key}"
    cache = scheduler.kv_cache
    return Counter(
        choices=len(choices),
        tokens=sum(len(choice.output_token_ids) for choice in choices),
        aborts=sum(choice.finish_reason is FinishReason.ABORT for choice in choices),
        preemptions=scheduler.num_preemptions,
        evictions=cache.num_evictions,
        cached_tokens=cache.num_prompt_tokens_hit,
    )


def tokens_alone(runner: ModelRunner, ask: Ask, index: int) -> list[int]:
    """The definition: an empty engine, nobody else, one plan at a time."""
    world = World(runner, replace(runner.model_info, num_blocks=NUM_BLOCKS_ALONE))
    choice = ask.choice(0, index)
    world.scheduler.add_request(choice)
    world.run()
    return choice.output_token_ids


@pytest.mark.parametrize("family", TESTED)
def test_whatever_happens_to_a_request_its_tokens_are_those_it_has_alone(family: str, tmp_path: Path) -> None:
    config = ExecutorConfig(
        model=str(save_tiny(family, tmp_path)),
        served_model_name=family,
        max_model_len=64,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        block_size=BLOCK_SIZE,
        num_threads=1,
        kv_cache_memory_bytes=2**23,
    )
    runner = ModelRunner(config)
    assert runner.model_info.is_encoder_decoder == (family in ENCODER_DECODER)
    happened: Counter[str] = Counter()
    for seed in range(TESTED.index(family), NUM_TRACES, len(TESTED)):
        happened += play(config, runner, seed)
    print(f"{family}: {dict(happened)}")
    for kind in ("preemptions", "evictions", "cached_tokens", "aborts"):
        assert happened[kind] > 0, f"no {kind} in {NUM_TRACES} timelines"
