"""A row that has sampled EOS or a stop token computes nothing in plans that were made before its scheduler knew."""

from __future__ import annotations

import pytest

from tiny import save_tiny
from trivium.config import ExecutorConfig
from trivium.executor.model_runner import ModelRunner
from trivium.params import SamplingParams
from trivium.step import ModelRunnerOutput, NewRequestData, SchedulerOutput


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = save_tiny("llama", tmp_path_factory.mktemp("ended"))
    return ModelRunner(ExecutorConfig(model=str(path), served_model_name="m", max_num_seqs=4))


def begin(runner: ModelRunner, *sampling: SamplingParams) -> ModelRunnerOutput:
    runner.reset()
    new = tuple(
        NewRequestData(
            slot=slot,
            prompt_token_ids=(5, 6, 7),
            output_token_ids=(),
            num_computed_tokens=0,
            block_ids=(slot,),
            sampling=params,
            choice_index=0,
            max_tokens=8,
        )
        for slot, params in enumerate(sampling)
    )
    slots = tuple(range(len(sampling)))
    return runner.execute(SchedulerOutput(1, slots, (3,) * len(slots), new_requests=new))


def go_on(runner: ModelRunner, step: int, *slots: int) -> ModelRunnerOutput:
    output = runner.execute(SchedulerOutput(step, slots, (1,) * len(slots)))
    runner.check_invariants()
    return output


def greedy(**changes: object) -> SamplingParams:
    return SamplingParams(temperature=0, seed=0, **{"ignore_eos": True, **changes})  # type: ignore[arg-type]


def test_a_stopped_row_is_left_out_and_the_others_go_on(runner: ModelRunner) -> None:
    first = begin(runner, greedy()).token_ids[0]
    alone = [go_on(runner, step, 0).token_ids for step in (2, 3)]
    both = begin(runner, greedy(stop_token_ids=(first,)), greedy())
    assert both.token_ids == (first, first)
    for step, expected in zip((2, 3), alone, strict=True):
        output = go_on(runner, step, 0, 1)
        assert output.slots == (1,) and output.token_ids == expected


def test_a_plan_of_nothing_but_ended_rows_has_an_empty_result(runner: ModelRunner) -> None:
    first = begin(runner, greedy()).token_ids[0]
    begin(runner, greedy(stop_token_ids=(first,)))
    assert go_on(runner, 2, 0) == ModelRunnerOutput(step=2)
    assert go_on(runner, 3, 0) == ModelRunnerOutput(step=3)


def test_min_tokens_and_a_new_request_in_the_slot_are_heeded(runner: ModelRunner) -> None:
    first = begin(runner, greedy()).token_ids[0]
    begin(runner, greedy(stop_token_ids=(first,)))
    assert begin(runner, greedy(stop_token_ids=(first,), min_tokens=2)).token_ids[0] != first
    assert go_on(runner, 2, 0).slots == (0,)
