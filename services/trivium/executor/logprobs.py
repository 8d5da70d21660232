"""Log-probabilities of sampled and of prompt tokens, for the rows that asked for them.

They are of the model's own distribution, log_softmax of its logits, before anything that `sampler.py` does to them. A
row that did not ask costs a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.input_batch import InputBatch, Longs, ScheduledRows
from trivium.executor.models.model import NOT_A_TOKEN
from trivium.executor.vocabulary import WHOLE, Vocabulary
from trivium.outputs import NO_TOKEN_LOGPROBS, TokenLogprobs
from trivium.step import SlotLogprobs

PIECE_ROWS = 256  # prompt tokens whose logits are in memory at a time

ComputeLogits = Callable[[Tensor], Tensor]  # [num_tokens, hidden] -> [num_tokens, vocab_size]


def token_logprobs(
    logits: Tensor, token_ids: Longs, num_top: Sequence[int], vocabulary: Vocabulary = WHOLE
) -> list[TokenLogprobs]:
    """logits [num_rows, vocab_size] as the model made them, the token of each row, how many top tokens it reports.

    rank: 1 + the number of tokens that are more likely.
    """
    if not len(token_ids):
        return []
    norm = vocabulary.logsumexp(logits)
    chosen = vocabulary.pick(logits, transfers.upload(token_ids, logits.device))
    ranks = (vocabulary.sum(logits > chosen) + 1).tolist()
    top_logits, indices = vocabulary.top_k(logits, min(max(num_top), vocabulary.size(logits)))
    top_values, top_ids = (top_logits - norm).tolist(), indices.tolist()
    rows = zip((chosen - norm).squeeze(1).tolist(), ranks, top_ids, top_values, num_top, strict=True)
    return [
        TokenLogprobs(logprob, rank, tuple(ids[:count]), tuple(values[:count]))
        for logprob, rank, ids, values, count in rows
    ]


class SampledLogprobs:
    """The rows of one step that report what they sample. Keeps their logits, which the sampler may overwrite."""

    def __init__(self, logits: Tensor, batch: InputBatch, slots: Longs, vocabulary: Vocabulary = WHOLE) -> None:
        self._vocabulary = vocabulary
        self._num_top = batch.sampling.num_logprobs[slots]
        self._rows = np.flatnonzero(self._num_top >= 0)
        self._logits = logits[transfers.upload(self._rows, logits.device)] if len(self._rows) else None

    def of(self, token_ids: Longs) -> dict[int, TokenLogprobs]:
        """Row -> the log-probabilities of what it sampled; token_ids [num_rows]."""
        if self._logits is None:
            return {}
        num_top = self._num_top[self._rows].tolist()
        found = token_logprobs(self._logits, token_ids[self._rows], num_top, self._vocabulary)
        return dict(zip(self._rows.tolist(), found, strict=True))


def prompt_logprobs(
    batch: InputBatch,
    rows: ScheduledRows,
    hidden: Tensor,
    compute_logits: ComputeLogits,
    vocabulary: Vocabulary = WHOLE,
) -> dict[int, tuple[int, list[TokenLogprobs]]]:
    """Slot -> (position of the first one, log-probabilities of the prompt tokens that follow its tokens of this step).

    hidden [num_tokens, hidden] of the scheduled tokens: the one at a position tells the likelihood of the next token.
    Call before the batch advances.
    """
    num_top = batch.sampling.num_prompt_logprobs[rows.slots]
    asking = np.flatnonzero(num_top >= 0)
    if not len(asking):
        return {}
    found = {}
    first_tokens = np.cumsum(rows.num_tokens) - rows.num_tokens
    for row in asking:
        slot, start = int(rows.slots[row]), int(batch.num_computed_tokens[rows.slots[row]])
        end = min(start + int(rows.num_tokens[row]), int(batch.num_prompt_tokens[slot]) - 1)
        if start < end:
            token_ids = batch.token_ids[slot, start + 1 : end + 1].astype(np.int64)
            row_hidden = hidden[first_tokens[row] : first_tokens[row] + end - start]
            pieces = _in_pieces(row_hidden, token_ids, int(num_top[row]), compute_logits, vocabulary)
            found[slot] = start + 1, pieces
    return found


def _in_pieces(
    hidden: Tensor, token_ids: Longs, num_top: int, compute_logits: ComputeLogits, vocabulary: Vocabulary
) -> list[TokenLogprobs]:
    """Of each of `token_ids`, of which NOT_A_TOKEN is none."""
    found = [NO_TOKEN_LOGPROBS] * len(token_ids)
    tokens = np.flatnonzero(token_ids != NOT_A_TOKEN)
    for start in range(0, len(tokens), PIECE_ROWS):
        piece = tokens[start : start + PIECE_ROWS]
        logits = compute_logits(hidden[transfers.upload(piece, hidden.device)])
        values = token_logprobs(logits, token_ids[piece], [num_top] * len(piece), vocabulary)
        for index, value in zip(piece, values, strict=True):
            found[index] = value
    return found


def slot_logprobs(
    slots: Longs, sampled: dict[int, TokenLogprobs], prompts: dict[int, tuple[int, list[TokenLogprobs]]]
) -> tuple[SlotLogprobs, ...]:
    """One entry for each slot that has something to report; `sampled` is by row of `slots`, `prompts` by slot."""
    if not sampled and not prompts:
        return ()
    by_slot = {int(slots[row]): value for row, value in sampled.items()}
    return tuple(
        SlotLogprobs(slot, by_slot.get(slot), start, tuple(values))
        for slot in {**by_slot, **prompts}
        for start, values in [prompts.get(slot, (0, []))]
    )
