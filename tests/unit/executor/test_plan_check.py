"""A plan that does not fit the standing batch is refused as a whole, and the batch stays as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trivium.executor.input_batch import BatchLimits, InputBatch
from trivium.executor.plan_check import PlanError, check_plan
from trivium.params import SamplingParams
from trivium.step import CachedRequestData, NewRequestData, SchedulerOutput

LIMITS = BatchLimits(
    max_num_seqs=4,
    max_num_batched_tokens=10,
    max_model_len=12,
    max_encoder_len=8,
    num_blocks=20,
    block_size=4,
    vocab_size=100,
    num_host_blocks=3,
)
NEW = NewRequestData(
    slot=1,
    prompt_token_ids=(1, 2, 3),
    output_token_ids=(),
    num_computed_tokens=0,
    block_ids=(5,),
    sampling=SamplingParams(max_tokens=4),
    choice_index=0,
    max_tokens=4,
    encoder_token_ids=(9, 9),
    cross_block_ids=(6,),
)
PLAN = SchedulerOutput(2, (1,), (3,), new_requests=(NEW,), encoder_slots=(1,))


def make_batch() -> InputBatch:
    """Slot 0 holds a row with 4 of 4 prompt tokens computed and one sampled: it has one block, and needs another."""
    batch = InputBatch(LIMITS)
    row = replace(NEW, slot=0, prompt_token_ids=(1, 2, 3, 4), block_ids=(0,), max_tokens=2)
    batch.apply(SchedulerOutput(1, new_requests=(row,)))
    rows = batch.schedule_rows(SchedulerOutput(1, (0,), (4,)))
    batch.advance(rows)
    batch.append_tokens(np.array([0]), np.array([50]))
    batch.check_invariants()
    return batch


def with_new(**changes: object) -> SchedulerOutput:
    return replace(PLAN, new_requests=(replace(NEW, **changes),))  # type: ignore[arg-type]


def grown(*blocks: int) -> CachedRequestData:
    return CachedRequestData((0,), (blocks,))


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        SchedulerOutput(2, (0,), (1,), new_blocks=grown(3)),
        SchedulerOutput(2, freed_slots=(0,)),
        SchedulerOutput(2, (0,), (3,), new_requests=(replace(NEW, slot=0),), freed_slots=(0,)),
        with_new(output_token_ids=(4, 5, 6), num_computed_tokens=2, block_ids=(1, 2)),
        SchedulerOutput(2, swapped_out=((3, 0), (3, 1)), swapped_in=((3, 2), (4, 2)), copied_blocks=((3, 5), (5, 3))),
    ],
)
def test_a_fitting_plan_passes(plan: SchedulerOutput) -> None:
    batch = make_batch()
    check_plan(batch, plan)
    batch.apply(plan)
    batch.check_invariants()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (with_new(slot=4), "slot 4 is outside the 4 slots"),
        (with_new(slot=0), "slot 0 is initialised, but it is in use"),
        (with_new(prompt_token_ids=()), "slot 1 has 0 prompt"),
        (with_new(prompt_token_ids=(1,) * 13), "13 tokens; limit 12"),
        (with_new(prompt_token_ids=(1, 100, 3)), "token id 100 is outside"),
        (with_new(num_computed_tokens=3), "3 of 3 tokens computed"),
        (with_new(output_token_ids=(1, 2, 3, 4)), "4 of at most 4 output tokens"),
        (with_new(block_ids=(20,)), "block id 20 is outside"),
        (with_new(block_ids=(1, 2, 3, 4)), "slot 1 gets 4 blocks; limit 3"),
        (with_new(block_ids=()), "slot 1 is to reach 3 tokens, its blocks hold 0"),
        (with_new(encoder_token_ids=()), "slot 1 has 0 encoder tokens"),
        (with_new(encoder_token_ids=(1,) * 9), "slot 1 has 9 encoder tokens; limit 8"),
        (with_new(encoder_token_ids=(1,) * 5), "1 cross blocks, but its encoder input needs 2"),
        (with_new(encoder_token_ids=(1, 200)), "token id 200"),
        (replace(PLAN, num_scheduled_tokens=(4,)), "slot 1 is to reach 4 of its 3 tokens"),
        (replace(PLAN, num_scheduled_tokens=(0,)), "slot 1 is to reach 0 of its 3 tokens"),
        (replace(PLAN, num_scheduled_tokens=(11,)), "11 tokens are scheduled; limit 10"),
        (SchedulerOutput(2, (0, 0), (1, 1), new_blocks=grown(3)), "a slot is scheduled twice"),
        (SchedulerOutput(2, (0,), (1,)), "slot 0 is to reach 5 tokens, its blocks hold 4"),
        (SchedulerOutput(2, (2,), (1,)), "slot 2 is scheduled, but it is not in use"),
        (SchedulerOutput(2, (7,), (1,)), "slot 7 is scheduled, but it is not in use"),
        (SchedulerOutput(2, (0,), (1,), freed_slots=(0,)), "slot 0 is scheduled, but it is not in use"),
        (SchedulerOutput(2, freed_slots=(3,)), "slot 3 is freed, but it is not in use"),
        (SchedulerOutput(2, freed_slots=(0, 0)), "slot 0 is freed, but it is not in use"),
        (SchedulerOutput(2, encoder_slots=(2,)), "slot 2 is encoded, but it is not in use"),
        (SchedulerOutput(2, new_blocks=CachedRequestData((2,), ((1,),))), "slot 2 is granted blocks"),
        (SchedulerOutput(2, copied_blocks=((1, 20),)), "copy: block id 20 is outside"),
        (SchedulerOutput(2, copied_blocks=((20, 1),)), "copy: block id 20 is outside"),
        (SchedulerOutput(2, swapped_out=((20, 1),)), "swap: block id 20 is outside"),
        (SchedulerOutput(2, swapped_out=((1, 3),)), "swap: host block id 3 is outside"),
        (SchedulerOutput(2, swapped_in=((20, 1),)), "swap: block id 20 is outside"),
        (SchedulerOutput(2, swapped_in=((1, 3),)), "swap: host block id 3 is outside"),
        (SchedulerOutput(2, swapped_out=((1, 2), (4, 2))), "host block 2 is copied to twice"),
        (SchedulerOutput(2, swapped_in=((4, 1), (4, 2))), "block 4 is copied to twice"),
        (SchedulerOutput(2, copied_blocks=((1, 4), (2, 5), (3, 4))), "block 4 is copied to twice"),
        (SchedulerOutput(2, new_blocks=grown(99)), "block id 99 is outside"),
        (SchedulerOutput(2, new_blocks=grown(1, 2, 3)), "slot 0 gets 4 blocks; limit 3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: SchedulerOutput, message: str) -> None:
    batch, untouched = make_batch(), make_batch()
    with pytest.raises(PlanError, match=message):
        check_plan(batch, plan)
    for name in ("occupied", "num_tokens", "num_computed_tokens", "num_blocks", "block_tables", "token_ids"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(untouched, name))


def test_sampling_beyond_max_tokens_is_refused() -> None:
    batch = make_batch()
    plan = SchedulerOutput(2, (0,), (1,), new_blocks=grown(3))
    batch.apply(plan)
    batch.advance(batch.schedule_rows(plan))
    batch.append_tokens(np.array([0]), np.array([51]))
    with pytest.raises(PlanError, match="slot 0 is to sample more than its max_tokens"):
        check_plan(batch, SchedulerOutput(3, (0,), (1,)))
