"""In every layer the keys and values of all rows are written before any row reads: `trivium.step` promises that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared_blocks import OWN, first_tokens
from tiny import BART_LIKE, FAMILIES, T5_LIKE, save_tiny
from trivium.errors import InvalidRequestError
from trivium.executor.grammars import GrammarService
from trivium.params import BeamSettings, SamplingParams
from trivium.step import CachedRequestData, NewRequestData, SchedulerOutput
from trivium.structured_outputs import StructuredOutputsParams
from unit.executor.parity import TOLERANCE, make_runner
from unit.executor.test_fallback import RUNNING, save

GREEDY = SamplingParams(temperature=0.0, max_tokens=2, seed=0, logprobs=5)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *BART_LIKE, *T5_LIKE, *RUNNING}))
def test_rows_read_what_another_row_of_their_step_writes(family: str, tmp_path: Path) -> None:
    path = save(family, tmp_path) if family in RUNNING else save_tiny(family, tmp_path)
    runner = make_runner(path)
    shared, alone = (first_tokens(runner, GREEDY, is_shared=is_shared) for is_shared in (True, False))
    assert len(shared) == 1 + len(OWN)
    for (token_id, logprobs), (expected_id, expected) in zip(shared, alone, strict=True):
        assert token_id == expected_id
        assert logprobs is not None and expected is not None
        assert logprobs.top_logprobs == pytest.approx(expected.top_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("width", [0, 2])
def test_a_row_whose_grammar_fails_computes_its_prompt_all_the_same(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a plan on its way would leave blocks empty that others have found already. Width 0: no beams."""
    runner = make_runner(save_tiny("llama", tmp_path))

    def refuse(self: GrammarService, params: StructuredOutputsParams) -> None:
        raise InvalidRequestError("no such grammar")

    monkeypatch.setattr(GrammarService, "matcher", refuse)
    sampling = SamplingParams(temperature=0.0, seed=0, structured_outputs=StructuredOutputsParams(regex="a"))
    slots = tuple(range(width)) if width else (0,)
    row = NewRequestData(
        slot=0,
        prompt_token_ids=tuple(range(5, 15)),
        output_token_ids=(),
        num_computed_tokens=0,
        block_ids=(0, 1, 2),
        sampling=replace(sampling, beam=BeamSettings(width=width)) if width else sampling,
        choice_index=0,
        max_tokens=4,
        beam_slots=slots if width else (),
    )
    first = runner.execute(SchedulerOutput(1, (0,), (4,), new_requests=(row,)))
    second = runner.execute(SchedulerOutput(2, (0,), (4,)))
    assert first.failures == second.failures == ()
    grown = CachedRequestData(slots[1:], ((0, 1, 3),) * len(slots[1:]))
    last = runner.execute(SchedulerOutput(3, (0,), (2,), new_blocks=grown))
    assert [failure.message for failure in last.failures] == ["no such grammar"]
    after = runner.execute(SchedulerOutput(4, slots, (1,) * len(slots)))
    assert (after.slots, after.beams) == ((), ()), "it computes nothing more"
