"""With KV memory for a tenth of the load everybody ends, and nobody waits longer than three times the median.

Waiting is counted in steps, from arrival to end: times would say more about the machine than about the scheduler.
"""

from __future__ import annotations

import random
import statistics

import pytest

from toy import expected_output, make_request
from trivium.scheduler.request import Request
from unit.scheduler.test_scheduler import World

NUM_REQUESTS = 80
BLOCK_SIZE = 4
MAX_STEPS = 20_000


def make_load(rng: random.Random) -> list[Request]:
    """Prompts of 1 to 40 tokens, outputs of 5 to 40."""
    return [
        make_request(
            key,
            tuple(rng.randrange(5, 20) for _ in range(rng.randint(1, 40))),
            max_tokens=rng.randint(5, 40),
            ignore_eos=True,
        )
        for key in range(1, NUM_REQUESTS + 1)
    ]


@pytest.mark.parametrize("num_host_blocks", [0, 200], ids=["compute again", "swap"])
@pytest.mark.parametrize("steps_apart", [0, 2, 6])
def test_nobody_waits_longer_than_three_times_the_median(steps_apart: int, num_host_blocks: int) -> None:
    requests = make_load(random.Random(7 + steps_apart))
    needed = [-(-(request.num_prompt_tokens + request.max_tokens) // BLOCK_SIZE) for request in requests]
    world = World(
        num_blocks=sum(needed) // 10,
        num_host_blocks=num_host_blocks,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=64,
    )
    arrivals = [index * steps_apart for index in range(NUM_REQUESTS)]
    waits: list[int] = []
    running = list(zip(arrivals, requests, strict=True))
    for step in range(MAX_STEPS):
        for arrival, request in running:
            if arrival == step:
                world.scheduler.check_admission(request)
                world.scheduler.add_request(request)
        world.step()
        waits += [step - arrival for arrival, request in running if request.is_finished]
        running = [item for item in running if not item[1].is_finished]
        if not running:
            break
    assert len(waits) == NUM_REQUESTS
    assert max(waits) <= 3 * statistics.median(waits)
    assert [request.output_token_ids for request in requests] == [expected_output(request) for request in requests]
    assert world.scheduler.num_held_blocks == 0
    if steps_apart == 0:
        assert world.scheduler.num_preemptions > 0
