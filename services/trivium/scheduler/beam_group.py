"""The beams of one request, as the scheduler sees them: slots, searches, and the choices that the caller gets."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.beam_search import BeamNode, BeamSearch, Hypothesis
from trivium.outputs import FinishReason
from trivium.params import BeamSettings
from trivium.scheduler.request import Request, RequestStatus
from trivium.step import BeamCandidates


class BeamGroup:
    """Owner: the Scheduler. `leader` is what is scheduled; `choices` are only delivered, and share its prompt.

    A group that loses its slots starts over: the same prompt gives the same beams. What its choices were given already
    is the beginning of what they will be given.
    """

    def __init__(
        self, leader: Request, beam: BeamSettings, choices: Sequence[Request], eos_token_ids: Sequence[int]
    ) -> None:
        self.leader = leader
        self.choices = tuple(choices)
        self.slots: tuple[int, ...] = ()
        self.width = beam.width
        self._beam = beam
        self._eos_token_ids = tuple(eos_token_ids)
        self._searches: tuple[BeamSearch, ...] = ()
        self.reset()

    @property
    def is_done(self) -> bool:
        return all(search.is_done for search in self._searches)

    @property
    def lacks_results(self) -> bool:
        """Whether the group is done with fewer hypotheses than choices: a grammar allows for no more."""
        return self.is_done and len(self.best()) <= max(choice.choice_index for choice in self.choices)

    @property
    def first_slots(self) -> tuple[int, ...]:
        """The first slot of every search: its candidates come under it."""
        return self.slots[:: self._searches[0].width]

    @property
    def live_slots(self) -> tuple[int, ...]:
        """Slots of the searches that are not known to be done."""
        if len(self._searches) == 1:
            return self.slots
        width = self._searches[0].width
        return tuple(slot for i, slot in enumerate(self.slots) if not self._searches[i // width].is_done)

    def reset(self) -> None:
        """Forget every beam."""
        sampling, max_tokens = self.leader.sampling, self.leader.max_tokens
        self._searches = tuple(
            BeamSearch(self._beam, sampling, max_tokens, self._eos_token_ids) for _ in range(self._beam.num_groups)
        )

    def advance(self, found: Sequence[BeamCandidates]) -> tuple[int, ...]:
        """Take one step. The beam that each beam of the group goes on from; itself, if its search is done."""
        parents = list(range(self.width))
        by_slot = {candidates.slot: candidates for candidates in found}
        for index, first_slot in enumerate(self.first_slots):
            search = self._searches[index]
            if first_slot in by_slot:
                moved = search.advance(by_slot[first_slot])
                if not search.is_done:
                    start = index * search.width
                    parents[start : start + search.width] = [start + parent for parent in moved]
        return tuple(parents)

    def start(self, slots: tuple[int, ...]) -> None:
        """The group runs in `slots`."""
        self.slots = slots
        for choice in self.choices:
            if not choice.is_finished:
                choice.status = RequestStatus.RUNNING
                choice.num_cached_tokens = self.leader.num_cached_tokens

    def take_news(self) -> list[tuple[Request, Sequence[BeamNode]]]:
        """(choice, its new tokens): what all results begin with, and once the group is done, the results.

        The tokens are the choices' output from now on; choices that are done are finished.
        """
        if self.is_done:
            best = self.best()
            return [self._finish(choice, best[choice.choice_index]) for choice in self.choices]
        tail = self._common_tail()
        if tail is None:
            return []
        return [(choice, _give(choice, tail)) for choice in self.choices if tail.length > len(choice.output_token_ids)]

    def best(self) -> list[Hypothesis]:
        """The hypotheses of a group that is done, best first; choice i is the i-th."""
        hypotheses = [hypothesis for search in self._searches for hypothesis in search.hypotheses]
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)

    def _common_tail(self) -> BeamNode | None:
        """The last token of what every result will begin with. Searches of several groups differ from the first on."""
        return self._searches[0].common_tail() if len(self._searches) == 1 else None

    def _finish(self, choice: Request, hypothesis: Hypothesis) -> tuple[Request, Sequence[BeamNode]]:
        new = _give(choice, hypothesis.tail)
        if not choice.is_finished:
            choice.status, choice.finish_reason = RequestStatus.FINISHED, hypothesis.finish_reason
            choice.cumulative_logprob, choice.ends_in_text = hypothesis.sum_logprobs, hypothesis.is_text
            last = hypothesis.tail.token_id
            if hypothesis.finish_reason is FinishReason.STOP and last in choice.sampling.stop_token_ids:
                choice.stop_reason = last
        return choice, new


def _give(choice: Request, tail: BeamNode) -> Sequence[BeamNode]:
    """Append to the output of `choice` what it was not given yet of the sequence that ends with `tail`."""
    if choice.is_finished:
        return ()
    new = tail.nodes(after=len(choice.output_token_ids))
    choice.output_token_ids += [node.token_id for node in new]
    return new
