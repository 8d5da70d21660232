"""Scheduler time per step with a stub executor: python benchmarks/scheduler.py

Every row decodes; nothing sleeps. One step is `schedule` plus `update_from_output`; text, messages and the model are
not in it. Prints the median per step, and its share of one running request, with a queue of waiting requests behind.
"""

import statistics
import time

from trivium.config import ModelInfo
from trivium.inputs import EncodedPrompt
from trivium.params import SamplingParams
from trivium.scheduler.request import Request
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput

STEPS = 40
WARMUP_STEPS = 5
PROMPT = EncodedPrompt(tuple(range(3, 35)))
SAMPLING = SamplingParams(temperature=0, max_tokens=1000, seed=0, ignore_eos=True)


def make_scheduler(num_running: int, num_waiting: int) -> Scheduler:
    info = ModelInfo(
        name="stub",
        architecture="stub",
        is_encoder_decoder=False,
        max_model_len=4096,
        max_encoder_len=0,
        vocab_size=1000,
        dtype="float32",
        block_size=16,
        num_blocks=num_running * 80,
        max_num_seqs=num_running,
        max_num_batched_tokens=max(2048, 64 * num_running),
    )
    scheduler = Scheduler(info)
    for key in range(num_running + num_waiting):
        prompt = EncodedPrompt((key % 900, *PROMPT.token_ids))
        scheduler.add_request(Request(key, prompt, SAMPLING, max_tokens=1000))
    return scheduler


def seconds_per_step(scheduler: Scheduler) -> float:
    seconds = []
    for step in range(WARMUP_STEPS + STEPS):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None, "a decoding batch always has a plan"
        output = ModelRunnerOutput(plan.step, plan.scheduled_slots, (5,) * len(plan.scheduled_slots))
        resumed = time.perf_counter()
        scheduler.update_from_output(output)
        if step >= WARMUP_STEPS:
            seconds.append(planned - begin + time.perf_counter() - resumed)
    return statistics.median(seconds)


def main() -> None:
    print(f"{'running':>8} {'waiting':>8} {'us/step':>10} {'us/request':>11}")
    for num_running, num_waiting in ((64, 0), (1000, 0), (1000, 10_000), (1000, 100_000), (10_000, 0)):
        seconds = seconds_per_step(make_scheduler(num_running, num_waiting))
        print(f"{num_running:>8} {num_waiting:>8} {1e6 * seconds:>10.0f} {1e6 * seconds / num_running:>11.2f}")


if __name__ == "__main__":
    main()
