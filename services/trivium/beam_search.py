"""Beam search by the rules of transformers' `generate`: which beams go on, which hypotheses are kept, when it ends.

Pure, and small on purpose: the executor and the scheduler each run it on the same candidates, in the same order, and so
agree about beams and block tables without telling each other. Numbers are sums of natural log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.outputs import FinishReason, TokenLogprobs
from trivium.params import BeamSettings, SamplingParams
from trivium.step import BeamCandidates

_NOWHERE = -1e9  # what transformers adds to a score that must lose


@dataclass(frozen=True, slots=True, eq=False)
class BeamNode:
    """The last token of a beam; beams that have a history in common share its nodes."""

    parent: BeamNode | None
    token_id: int
    length: int
    logprobs: TokenLogprobs | None = None

    def nodes(self, *, after: int = 0) -> list[BeamNode]:
        """From the token behind the first `after` ones to this one."""
        path: list[BeamNode] = []
        node: BeamNode | None = self
        while node is not None and node.length > after:
            path.append(node)
            node = node.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended. score: sum_logprobs / length ** length_penalty.

    is_text: its last token completes a stop string; it is no token that stands for the end.
    """

    score: float
    sum_logprobs: float
    tail: BeamNode
    finish_reason: FinishReason
    is_text: bool = False


class BeamSearch:
    """One search of `width` beams over the tokens after a common prompt.

    Beams that end by EOS, a stop token id, a stop string or at `max_tokens` become hypotheses, if they are among the
    `width` best candidates of their step; the `width` best hypotheses are kept. There are `num_candidates` candidates
    per step, so that `width` of them can go on even if all the best ones end by a token id.
    """

    def __init__(
        self, beam: BeamSettings, params: SamplingParams, max_tokens: int, eos_token_ids: Sequence[int]
    ) -> None:
        self.width = beam.width // beam.num_groups
        self.num_tokens = 0
        self.is_done = False
        self.scores = [0.0] + [_NOWHERE] * (self.width - 1)  # of the live beams; at first they are all the same
        self.tails: list[BeamNode | None] = [None] * self.width
        self.hypotheses: list[Hypothesis] = []  # best first
        self._length_penalty = beam.length_penalty
        self._early_stopping = beam.early_stopping
        self._max_tokens = max_tokens
        self._min_tokens = params.min_tokens
        self._ends = frozenset(params.stop_token_ids) | frozenset(eos_token_ids if params.heeds_eos else ())
        self._always_ends = frozenset(() if params.structured_outputs is None else eos_token_ids)
        self._can_improve = True

    @property
    def num_candidates(self) -> int:
        return max(2, 1 + len(self._ends)) * self.width

    def advance(self, candidates: BeamCandidates) -> tuple[int, ...]:
        """Take the step that `candidates`, best first, are of. The beam that each live beam goes on from.

        After it `is_done` says whether the search has ended; `hypotheses` are then the result.
        """
        self.num_tokens += 1
        ends = [self._end_of(token_id, i in candidates.stops) for i, token_id in enumerate(candidates.token_ids)]
        tails = [
            BeamNode(
                self.tails[beam], token_id, self.num_tokens, candidates.logprobs[i] if candidates.logprobs else None
            )
            for i, (beam, token_id) in enumerate(zip(candidates.beams, candidates.token_ids, strict=True))
        ]
        self._keep_hypotheses(candidates, tails, ends)
        running = [
            (score if end is None else score + _NOWHERE, i)
            for i, (score, end) in enumerate(zip(candidates.scores, ends, strict=True))
        ]
        running.sort(key=lambda item: -item[0])  # stable: of equals the earlier candidate goes on
        chosen = [i for _, i in running[: self.width]]
        self.scores = [score for score, _ in running[: self.width]]
        self.tails = [tails[i] for i in chosen]
        self._check_done(all_ended=None not in ends)
        return tuple(candidates.beams[i] for i in chosen)

    def common_tail(self) -> BeamNode | None:
        """The last token that all live beams and all hypotheses have in common: every result begins so far."""
        tails = [*self.tails, *(hypothesis.tail for hypothesis in self.hypotheses)]
        common = tails[0]
        for tail in tails[1:]:
            common = _common_ancestor(common, tail)
        return common

    def _end_of(self, token_id: int, is_stop: bool) -> FinishReason | None:
        if is_stop or token_id in self._always_ends or (token_id in self._ends and self.num_tokens >= self._min_tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_tokens >= self._max_tokens else None

    def _keep_hypotheses(
        self, candidates: BeamCandidates, tails: Sequence[BeamNode], ends: Sequence[FinishReason | None]
    ) -> None:
        is_full = len(self.hypotheses) == self.width
        if not self._can_improve or (is_full and self._early_stopping is True):
            return
        divisor = self.num_tokens**self._length_penalty
        new = [
            Hypothesis(score / divisor, score, tail, end, is_text=i in candidates.stops)
            for i, (score, tail, end) in enumerate(zip(candidates.scores[: self.width], tails, ends, strict=False))
            if end is not None and math.isfinite(score)
        ]
        if new:
            kept = sorted([*self.hypotheses, *new], key=lambda hypothesis: -hypothesis.score)
            self.hypotheses = kept[: self.width]

    def _check_done(self, *, all_ended: bool) -> None:
        is_full = len(self.hypotheses) == self.width
        if is_full:
            may_grow = self._early_stopping == "never" and self._length_penalty > 0
            best_length = self._max_tokens if may_grow else self.num_tokens
            best_possible = self.scores[0] / best_length**self._length_penalty
            self._can_improve = self._can_improve and best_possible > self.hypotheses[-1].score
        is_dead = max(self.scores) == -math.inf  # nothing is left that a grammar or bans allow
        self.is_done = all_ended or is_dead or not self._can_improve or (is_full and self._early_stopping is True)


def move_blocks(
    tables: Sequence[Sequence[int]], parents: Sequence[int], num_tokens: int, block_size: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Block tables of the beams after a step, and the copies (from, to) that they need.

    `num_tokens` tokens of every beam are computed. Full blocks are shared with the parent. The last, partial block of
    a parent goes to the first of its children; the others copy it into the partial blocks of beams that nobody goes on
    from, of which there are just as many. Blocks behind those are granted already, but empty: they stay where they are.
    """
    num_full, has_partial = num_tokens // block_size, num_tokens % block_size > 0
    moved, copies = [list(tables[parent][:num_full]) for parent in parents], []
    if has_partial:
        childless = iter([beam for beam in range(len(tables)) if beam not in parents])
        seen: set[int] = set()
        for table, parent in zip(moved, parents, strict=True):
            block = tables[parent][num_full]
            if parent in seen:
                copy = tables[next(childless)][num_full]
                copies.append((block, copy))
                block = copy
            seen.add(parent)
            table.append(block)
    for table, old in zip(moved, tables, strict=True):
        table.extend(old[len(table) :])
    return moved, copies


def _common_ancestor(first: BeamNode | None, second: BeamNode | None) -> BeamNode | None:
    while first is not second:
        if first is None or second is None:
            return None
        if first.length > second.length:
            first = first.parent
        elif second.length > first.length:
            second = second.parent
        else:
            first, second = first.parent, second.parent
    return first
