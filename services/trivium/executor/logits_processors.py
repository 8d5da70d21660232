"""What requests forbid, favour, penalise and force: changes of the logits before greedy, random and beam choice alike.

Pure functions of logits, sequences and parameters: nothing is remembered between steps, so a row that is preempted or
resumed is treated as if it had never stopped. Order: allowed tokens, bans, bias, penalty of encoder tokens, repetition,
frequency and presence penalty, DRY; then forced tokens, against which nothing else counts. Where transformers and vLLM
have the same steps, this is their order, but for bans: a banned token stays banned whatever follows, so they may come
first. A ban that would leave a row without any token is lifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.history import PAD, History, encoder_matches, last, suffix_matches
from trivium.executor.input_batch import Longs
from trivium.executor.model_config import SpecialTokens
from trivium.executor.vocabulary import WHOLE, Vocabulary
from trivium.params import SamplingParams

_MAX_DRY_PENALTY = 1e5  # more than any difference of logits, and small enough to keep their order in float32
MAX_DRY_LENGTH = 512  # longer matches are penalised like this one: what a step may cost has to be bounded
NOT_FORCED = -1

Pairs = tuple[Sequence[int] | Longs, Sequence[int] | Longs]  # rows, token ids


def edit_logits(
    logits: Tensor,
    params: Sequence[SamplingParams],
    history: History,
    special: SpecialTokens,
    vocabulary: Vocabulary = WHOLE,
) -> None:
    """Change `logits` [num_rows, vocab_size], contiguous float32, in place, by all but forced tokens.

    `params` and `history` are of its rows. Log-probabilities may take the place of logits.
    """
    _allow(logits, params, vocabulary)
    for pairs in (
        _early_stops(params, history, special.eos),
        _bad_word_ends(params, history, special.eos),
        _repeated_ngram_ends(params, history),
        _encoder_ngram_ends(params, history),
        _suppressed(params),
        _suppressed_at_begin(params, history, special),
    ):
        _ban(logits, pairs, vocabulary)
    start = vocabulary.start
    _add_bias(logits, params, start)
    _penalise_encoder_tokens(logits, params, history, start)
    _penalise_repetition(logits, params, history, start)
    _penalise_output(logits, params, history, start)
    _penalise_repeated_sequences(logits, params, history, start)


def force_scores(
    scores: Tensor,
    params: Sequence[SamplingParams],
    num_tokens: Longs,
    output_positions: Longs,
    special: SpecialTokens,
    max_tokens: Longs,
    *,
    start: int = 0,
) -> None:
    """Change `scores` [num_rows, vocab_size] in place: where a token is forced, 0 for it and -inf for all others.

    Arguments as of `forced_tokens`; start: the token of the first column. Comes after `edit_logits`.
    """
    forced = forced_tokens(params, num_tokens, output_positions, special, max_tokens)
    rows = np.flatnonzero(forced != NOT_FORCED)
    if len(rows):
        scores[transfers.upload(rows, scores.device)] = -torch.inf
        scores.view(-1)[transfers.upload(_flat((rows, forced[rows]), scores, start), scores.device)] = 0.0


def forced_tokens(
    params: Sequence[SamplingParams],
    num_tokens: Longs,
    output_positions: Longs,
    special: SpecialTokens,
    max_tokens: Longs,
) -> Longs:
    """[num_rows] the only token that may come next, or NOT_FORCED.

    As in transformers: the BOS follows a sequence of one token, the EOS is the last of `max_tokens`, and where both
    are due the EOS wins. It is not forced where it would hide that a structured output was cut.
    num_tokens, output_positions, max_tokens: [num_rows] length of the sequence, of its output,
    and the output's limit.
    """
    forced = np.full(len(params), NOT_FORCED, np.int64)
    for row in np.flatnonzero(num_tokens == 1).tolist():
        token_id = _forced_bos(params[row], special)
        forced[row] = NOT_FORCED if token_id is None else token_id
    if special.forced_eos is not None:
        for row in np.flatnonzero(output_positions + 1 == max_tokens).tolist():
            if not params[row].ignore_eos and params[row].structured_outputs is None:
                forced[row] = special.forced_eos
    return forced


def _forced_bos(params: SamplingParams, special: SpecialTokens) -> int | None:
    return special.forced_bos if params.forced_bos_token_id is None else params.forced_bos_token_id


def _rows_where(params: Sequence[SamplingParams], wanted: Callable[[SamplingParams], object]) -> Longs:
    return np.array([row for row, row_params in enumerate(params) if wanted(row_params)], np.int64)


def _known(pairs: Pairs, vocab_size: int) -> tuple[Longs, Longs]:
    """The pairs whose token the model has: PAD is none."""
    rows, token_ids = np.asarray(pairs[0], np.int64), np.asarray(pairs[1], np.int64)
    known = (token_ids >= 0) & (token_ids < vocab_size)
    return rows[known], token_ids[known]


def _flat(pairs: Pairs, logits: Tensor, start: int) -> Longs:
    """Indices into the flattened logits, whose columns are of the tokens from `start` on; others are left out."""
    rows, columns = np.asarray(pairs[0], np.int64), np.asarray(pairs[1], np.int64) - start
    here = (columns >= 0) & (columns < logits.shape[1])
    flat: Longs = (rows * logits.shape[1] + columns)[here]
    return flat


def _allow(logits: Tensor, params: Sequence[SamplingParams], vocabulary: Vocabulary) -> None:
    rows = _rows_where(params, lambda row_params: row_params.allowed_token_ids)
    if not len(rows):
        return
    allowed = [params[row].allowed_token_ids or () for row in rows]
    every = np.repeat(rows, [len(ids) for ids in allowed]), list(chain(*allowed))
    pairs = _known(every, vocabulary.size(logits))
    kept = np.unique(pairs[0])  # rows with an allowed token that the model has
    index = transfers.upload(_flat(pairs, logits, vocabulary.start), logits.device)
    values = logits.view(-1)[index]
    logits[transfers.upload(kept, logits.device)] = -torch.inf
    logits.view(-1)[index] = values


def _ban(logits: Tensor, pairs: Pairs, vocabulary: Vocabulary) -> None:
    pairs = _known(pairs, vocabulary.size(logits))
    if not len(pairs[0]):
        return
    flat = _flat(pairs, logits, vocabulary.start)
    index = transfers.upload(flat, logits.device)
    before = logits.view(-1)[index]
    logits.view(-1)[index] = -torch.inf
    banned_rows = np.unique(pairs[0])
    nothing_left = np.zeros(len(logits), np.bool_)
    edited = logits if len(banned_rows) == len(logits) else logits[transfers.upload(banned_rows, logits.device)]
    nothing_left[banned_rows] = transfers.download(vocabulary.amax(edited).squeeze(1).isneginf())
    if nothing_left.any():
        lifted = transfers.upload(nothing_left[flat // logits.shape[1]], logits.device)
        logits.view(-1)[index[lifted]] = before[lifted]


def _early_stops(params: Sequence[SamplingParams], history: History, eos: Sequence[int]) -> Pairs:
    """What would end a row before its `min_tokens`."""
    num_output = history.num_tokens - history.num_prompt_tokens
    rows: list[int] = []
    token_ids: list[int] = []
    for row, row_params in enumerate(params):
        if num_output[row] < row_params.min_tokens:
            banned = {*eos, *row_params.stop_token_ids}
            rows += [row] * len(banned)
            token_ids += banned
    return rows, token_ids


def _bad_word_ends(params: Sequence[SamplingParams], history: History, eos: Sequence[int]) -> Pairs:
    """The last token of every bad word whose other tokens are the end of the sequence, prompt included.

    As in transformers, a word that is nothing but an EOS does not count.
    """
    rows, token_ids = [], []
    for row in _rows_where(params, lambda row_params: row_params.bad_words_token_ids).tolist():
        words = params[row].bad_words_token_ids
        tail = tuple(history.tokens[row, -max(len(word) for word in words) :].tolist())
        for word in words:
            start = len(tail) + 1 - len(word)
            is_eos = len(word) == 1 and word[0] in eos
            if start >= 0 and tail[start:] == word[:-1] and not is_eos:
                rows.append(row)
                token_ids.append(word[-1])
    return rows, token_ids


def _repeated_ngram_ends(params: Sequence[SamplingParams], history: History) -> Pairs:
    """What would complete an n-gram that the sequence has already, as transformers' NoRepeatNGramLogitsProcessor."""
    rows = _rows_where(params, lambda row_params: row_params.no_repeat_ngram_size == 1)
    single_rows, single_ids = history.subset(rows).pairs() if len(rows) else (rows, rows)
    single_rows = rows[single_rows]
    rows = _rows_where(params, lambda row_params: row_params.no_repeat_ngram_size > 1)
    if not len(rows):
        return single_rows, single_ids
    tokens = history.tokens[rows]
    sizes = np.array([params[row].no_repeat_ngram_size for row in rows], np.int64)
    found_rows, columns, lengths = suffix_matches(tokens, tokens != PAD, sizes - 1)
    complete = lengths >= sizes[found_rows] - 1
    found_rows, columns = found_rows[complete], columns[complete]
    next_ids = tokens[found_rows, columns + 1]
    return np.concatenate((single_rows, rows[found_rows])), np.concatenate((single_ids, next_ids))


def _encoder_ngram_ends(params: Sequence[SamplingParams], history: History) -> Pairs:
    """What would complete an n-gram of the encoder input, as transformers' EncoderNoRepeatNGramLogitsProcessor."""
    rows = _rows_where(params, lambda row_params: row_params.encoder_no_repeat_ngram_size == 1)
    single_rows, single_ids = history.encoder_pairs(rows) if len(rows) else (rows, rows)
    rows = _rows_where(params, lambda row_params: row_params.encoder_no_repeat_ngram_size > 1)
    if not len(rows):
        return single_rows, single_ids
    sizes = np.array([params[row].encoder_no_repeat_ngram_size for row in rows], np.int64)
    encoder = history.encoder_tokens(rows)
    found_rows, columns, lengths = encoder_matches(encoder, history.tokens[rows], sizes - 1)
    complete = lengths >= sizes[found_rows] - 1
    found_rows, columns = found_rows[complete], columns[complete]
    next_ids = encoder[found_rows, columns + 1]
    return np.concatenate((single_rows, rows[found_rows])), np.concatenate((single_ids, next_ids))


def _suppressed(params: Sequence[SamplingParams]) -> Pairs:
    rows = _rows_where(params, lambda row_params: row_params.suppress_tokens)
    ids = [params[row].suppress_tokens for row in rows]
    return np.repeat(rows, [len(row_ids) for row_ids in ids]), list(chain(*ids))


def _suppressed_at_begin(params: Sequence[SamplingParams], history: History, special: SpecialTokens) -> Pairs:
    """As transformers' SuppressTokensAtBeginLogitsProcessor: at the first position where no BOS is forced."""
    rows, token_ids = [], []
    for row in _rows_where(params, lambda row_params: row_params.begin_suppress_tokens).tolist():
        begin = int(history.num_prompt_tokens[row])
        if begin == 1 and _forced_bos(params[row], special) is not None:
            begin += 1
        if history.num_tokens[row] == begin:
            rows += [row] * len(params[row].begin_suppress_tokens)
            token_ids += params[row].begin_suppress_tokens
    return rows, token_ids


def _add_bias(logits: Tensor, params: Sequence[SamplingParams], start: int) -> None:
    triples = [
        (row, token_id - start, bias)
        for row, row_params in enumerate(params)
        for token_id, bias in row_params.logit_bias.items()
        if 0 <= token_id - start < logits.shape[1]
    ]
    if triples:
        rows, columns, biases = zip(*triples, strict=True)
        indices = (np.array(rows, np.int64), np.array(columns, np.int64), np.array(biases, np.float32))
        row_index, column_index, values = transfers.upload_all(indices, logits.device)
        logits[row_index, column_index] += values


def _penalise_encoder_tokens(logits: Tensor, params: Sequence[SamplingParams], history: History, start: int) -> None:
    """As transformers' EncoderRepetitionPenaltyLogitsProcessor: a penalty above 1 favours what the encoder has read."""
    rows = _rows_where(params, lambda row_params: row_params.encoder_repetition_penalty != 1.0)
    if len(rows):
        penalties = [1 / row_params.encoder_repetition_penalty for row_params in params]
        _scale(logits, history.encoder_pairs(rows), penalties, start)


def _penalise_repetition(logits: Tensor, params: Sequence[SamplingParams], history: History, start: int) -> None:
    """As transformers' RepetitionPenaltyLogitsProcessor: prompt and output count, and how often does not matter."""
    rows = _rows_where(params, lambda row_params: row_params.repetition_penalty != 1.0)
    if len(rows):
        found_rows, token_ids = history.subset(rows).pairs()
        _scale(logits, (rows[found_rows], token_ids), [row_params.repetition_penalty for row_params in params], start)


def _scale(logits: Tensor, pairs: Pairs, penalties: Sequence[float], start: int) -> None:
    """Make the tokens `pairs` less likely by the penalty of their row, more likely if that is below 1."""
    places = _flat(pairs, logits, start)
    of_places = np.array(penalties, np.float32)[places // logits.shape[1]]
    flat, penalty = transfers.upload_all((places, of_places), logits.device)
    scores = logits.view(-1)[flat]
    # A token that occurs twice is written twice, with the same value.
    logits.view(-1)[flat] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _penalise_output(logits: Tensor, params: Sequence[SamplingParams], history: History, start: int) -> None:
    """OpenAI's penalties: logit - count * frequency_penalty - (count > 0) * presence_penalty, count in the output."""
    rows = _rows_where(params, lambda row_params: row_params.frequency_penalty or row_params.presence_penalty)
    if not len(rows):
        return
    found_rows, token_ids = history.subset(rows).pairs(only_output=True)
    flat, counts = np.unique(_flat((rows[found_rows], token_ids), logits, start), return_counts=True)
    row = flat // logits.shape[1]
    frequency = np.array([row_params.frequency_penalty for row_params in params], np.float32)[row]
    presence = np.array([row_params.presence_penalty for row_params in params], np.float32)[row]
    index, of_counts, of_presence = transfers.upload_all(
        (flat, frequency * counts.astype(np.float32), presence), logits.device
    )
    logits.view(-1)[index] -= of_counts
    logits.view(-1)[index] -= of_presence


def _penalise_repeated_sequences(
    logits: Tensor, params: Sequence[SamplingParams], history: History, start: int
) -> None:
    """DRY (https://github.com/oobabooga/textgen/pull/5677): the longest match that a token would extend counts."""
    rows = _rows_where(params, lambda row_params: row_params.dry_multiplier > 0)
    if not len(rows):
        return
    tokens, dry = history.tokens[rows], [params[row] for row in rows]
    ranges = [row_params.dry_range or tokens.shape[1] for row_params in dry]
    usable = (tokens != PAD) & last(tokens.shape[1], np.array(ranges, np.int64))
    for row, row_params in enumerate(dry):
        if row_params.dry_sequence_breaker_ids:
            usable[row] &= ~np.isin(tokens[row], row_params.dry_sequence_breaker_ids)
    limits = np.array([_dry_length_limit(row_params) for row_params in dry], np.int64)
    found_rows, columns, lengths = suffix_matches(tokens, usable, limits)
    allowed = np.array([row_params.dry_allowed_length for row_params in dry], np.int64)
    next_columns = tokens[found_rows, columns + 1] - start
    here = (next_columns >= 0) & (next_columns < logits.shape[1])
    counts = (lengths >= allowed[found_rows]) & usable[found_rows, columns + 1] & here
    found_rows, next_columns, lengths = found_rows[counts], next_columns[counts], lengths[counts]
    if not len(found_rows):
        return
    order = np.argsort(lengths, kind="stable")  # of several writes to one place the last must be the longest
    keys = (rows[found_rows] * logits.shape[1] + next_columns)[order]
    flat, first_from_end = np.unique(keys[::-1], return_index=True)
    best_rows, best = found_rows[order][::-1][first_from_end], lengths[order][::-1][first_from_end]
    penalties = [_dry_penalty(dry[row], int(length)) for row, length in zip(best_rows, best, strict=True)]
    index, amounts = transfers.upload_all((flat, np.array(penalties, np.float32)), logits.device)
    logits.view(-1)[index] -= amounts


def _dry_penalty(params: SamplingParams, length: int) -> float:
    exponent = length - params.dry_allowed_length
    if exponent * math.log(params.dry_base) >= math.log(_MAX_DRY_PENALTY / params.dry_multiplier):
        return _MAX_DRY_PENALTY
    return float(params.dry_multiplier * params.dry_base**exponent)


def _dry_length_limit(params: SamplingParams) -> int:
    """A length from which on the penalty no longer grows."""
    steps = math.log(_MAX_DRY_PENALTY / params.dry_multiplier) / math.log(params.dry_base)
    return min(params.dry_allowed_length + max(math.ceil(steps), 0), MAX_DRY_LENGTH) + 1
