"""Rows that share blocks which another row of the same plan fills."""

from __future__ import annotations

from dataclasses import replace

from trivium.executor.model_runner import ModelRunner
from trivium.outputs import TokenLogprobs
from trivium.params import SamplingParams
from trivium.step import ModelRunnerOutput, NewRequestData, SchedulerOutput

NUM_SHARED_BLOCKS = 3
OWN = (1, 3)  # tokens of their own of the rows that share


def first_tokens(
    runner: ModelRunner, sampling: SamplingParams, *, is_shared: bool
) -> list[tuple[int, TokenLogprobs | None]]:
    """What rows with a common prefix say first; `is_shared`: two find it in blocks that the third one is still filling.

    That one, which the plan names last, has computed a part of the prefix in the plan before.
    """
    runner.reset()
    size = runner.model_info.block_size
    num_shared = NUM_SHARED_BLOCKS * size
    prefix = tuple(5 + 7 * index % 200 for index in range(num_shared))
    blocks = tuple(range(NUM_SHARED_BLOCKS))
    leader = _row(runner, 0, (*prefix, 40, 41), (*blocks, NUM_SHARED_BLOCKS), sampling)
    begun = size + 1
    runner.execute(SchedulerOutput(1, (0,), (begun,), new_requests=(leader,), encoder_slots=_if_encodes(leader)))
    sharers, counts = [], []
    for slot, num_own in enumerate(OWN, 1):
        own = tuple(50 + 10 * slot + index for index in range(num_own))
        first = slot * (NUM_SHARED_BLOCKS + 1)
        ids = (*blocks, first) if is_shared else tuple(range(first, first + NUM_SHARED_BLOCKS + 1))
        row = _row(runner, slot, (*prefix, *own), ids, sampling)
        row = replace(row, num_computed_tokens=num_shared) if is_shared else row
        sharers.append(row)
        counts.append(num_own if is_shared else num_shared + num_own)
    output = runner.execute(
        SchedulerOutput(2, (1, 2, 0), (*counts, num_shared + 2 - begun), new_requests=tuple(sharers))
    )
    runner.check_invariants()
    return _by_slot(output)


def _row(
    runner: ModelRunner, slot: int, prompt: tuple[int, ...], block_ids: tuple[int, ...], sampling: SamplingParams
) -> NewRequestData:
    """All rows have one encoder input, whose blocks are the last of the pool."""
    info = runner.model_info
    encoder = tuple(range(60, 66)) if info.is_encoder_decoder else ()
    num_cross = -(-len(encoder) // info.block_size)
    return NewRequestData(
        slot=slot,
        prompt_token_ids=prompt,
        output_token_ids=(),
        num_computed_tokens=0,
        block_ids=block_ids,
        sampling=sampling,
        choice_index=0,
        max_tokens=2,
        encoder_token_ids=encoder,
        cross_block_ids=tuple(range(info.num_blocks - num_cross, info.num_blocks)),
    )


def _if_encodes(row: NewRequestData) -> tuple[int, ...]:
    return (row.slot,) if row.encoder_token_ids else ()


def _by_slot(output: ModelRunnerOutput) -> list[tuple[int, TokenLogprobs | None]]:
    logprobs = {item.slot: item.sampled for item in output.logprobs}
    return [
        (token_id, logprobs.get(slot)) for slot, token_id in sorted(zip(output.slots, output.token_ids, strict=True))
    ]
