"""Penalties, bans and bias: as transformers where it has them, as their definitions say where it has not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from trivium.executor.history import History
from trivium.executor.input_batch import BatchLimits, InputBatch
from trivium.executor.logits_processors import MAX_DRY_LENGTH, edit_logits, force_scores
from trivium.executor.model_config import SpecialTokens
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput

VOCAB_SIZE = 50
EOS = 7
LIMITS = BatchLimits(
    max_num_seqs=16,
    max_num_batched_tokens=64,
    max_model_len=600,
    max_encoder_len=64,
    num_blocks=64,
    block_size=4,
    vocab_size=VOCAB_SIZE,
)

PLAIN = SpecialTokens(eos=(EOS,), bos=None, pad=None, decoder_start=None, forced_bos=None, forced_eos=None)
Row = tuple[list[int], list[int], dict[str, Any]]  # prompt, output, parameters; "encoder" there is the encoder input


def edit(logits: Tensor, *rows: Row, special: SpecialTokens = PLAIN) -> Tensor:
    """`logits` [num_rows, VOCAB_SIZE] as the rows change them."""
    batch = InputBatch(LIMITS)
    new = []
    for slot, (prompt, output, given) in enumerate(rows):
        params = dict(given)
        encoder = tuple(params.pop("encoder", ()))
        sampling = SamplingParams(seed=1, **params)
        new.append(NewRequestData(slot, tuple(prompt), tuple(output), 0, (), sampling, 0, 16, encoder))
    batch.apply(SchedulerOutput(0, new_requests=tuple(new)))
    edited = logits.clone()
    edit_logits(edited, [row.sampling for row in new], History.of(batch, np.arange(len(rows))), special)
    return edited


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn((num_rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(seed))


def random_tokens(length: int, seed: int, *, kinds: int = 4) -> list[int]:
    """Few kinds of tokens, so that much repeats."""
    rng = random.Random(seed)
    return [10 + rng.randrange(kinds) for _ in range(length)]


SEQUENCES = [
    (random_tokens(1 + seed, seed, kinds=2 + seed % 3), random_tokens(seed * 3, seed + 99, kinds=2 + seed % 3))
    for seed in range(14)
]


def edit_all(params: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(before, after) for the rows of SEQUENCES, which have different lengths, in one batch."""
    before = random_logits(len(SEQUENCES))
    return before, edit(before, *((prompt, output, params) for prompt, output in SEQUENCES))


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    before, after = edit_all({"repetition_penalty": penalty})
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
    for row, (prompt, output) in enumerate(SEQUENCES):
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        assert torch.equal(after[row : row + 1], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_repeat_ngram_size_equals_transformers(size: int) -> None:
    before, after = edit_all({"no_repeat_ngram_size": size})
    processor = hf.NoRepeatNGramLogitsProcessor(size)
    num_banned = 0
    for row, (prompt, output) in enumerate(SEQUENCES):
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        num_banned += int(expected.isneginf().sum())
        assert torch.equal(after[row : row + 1], expected)
    assert num_banned > 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_no_repeat_ngram_size_of_one_repeated_token_equals_transformers(length: int) -> None:
    """A sequence alone fills its row: nothing before its first token may count."""
    before = random_logits(1)
    expected = hf.NoRepeatNGramLogitsProcessor(4)(torch.full((1, length), 10), before)
    assert torch.equal(edit(before, ([10] * length, [], {"no_repeat_ngram_size": 4})), expected)
    assert bool(expected.isinf().any()) == (length >= 4)


ENCODERS = [random_tokens(1 + (7 * seed) % 23, seed + 500, kinds=2 + seed % 3) for seed in range(len(SEQUENCES))]


def edit_with_encoders(params: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As `edit_all`, with encoder inputs of different lengths."""
    before = random_logits(len(SEQUENCES))
    rows = zip(SEQUENCES, ENCODERS, strict=True)
    return before, edit(before, *((prompt, output, params | {"encoder": ids}) for (prompt, output), ids in rows))


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_encoder_repetition_penalty_equals_transformers(penalty: float) -> None:
    before, after = edit_with_encoders({"encoder_repetition_penalty": penalty})
    for row, (prompt, output) in enumerate(SEQUENCES):
        processor = hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor([ENCODERS[row]]))
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        assert torch.equal(after[row : row + 1], expected)
        assert not torch.equal(expected[0], before[row])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_encoder_no_repeat_ngram_size_equals_transformers(size: int) -> None:
    before, after = edit_with_encoders({"encoder_no_repeat_ngram_size": size})
    num_banned = 0
    for row, (prompt, output) in enumerate(SEQUENCES):
        processor = hf.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor([ENCODERS[row]]))
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        num_banned += int(expected.isneginf().sum())
        assert torch.equal(after[row : row + 1], expected)
    assert num_banned > 3


def test_sequence_shorter_than_an_encoder_ngram_bans_nothing() -> None:
    before = random_logits(1)
    params = {"encoder_no_repeat_ngram_size": 4, "encoder": [10] * 9}
    assert torch.equal(edit(before, ([10], [10], params)), before)
    assert torch.nonzero(edit(before, ([10], [10, 10], params)).isneginf()).tolist() == [[0, 10]]


def test_suppress_tokens_equals_transformers() -> None:
    before, after = edit_all({"suppress_tokens": [3, 49, EOS]})
    processor = hf.SuppressTokensLogitsProcessor([3, 49, EOS])
    assert torch.equal(after, processor(torch.zeros((len(before), 1), dtype=torch.int64), before))


@pytest.mark.parametrize("model_bos", [None, 4])
@pytest.mark.parametrize("own_bos", [None, 5])
@pytest.mark.parametrize("num_prompt", [1, 2, 3])
def test_begin_suppress_tokens_equals_transformers(num_prompt: int, own_bos: int | None, model_bos: int | None) -> None:
    special = replace(PLAIN, forced_bos=model_bos)
    params = {"begin_suppress_tokens": [3, 49], "forced_bos_token_id": own_bos}
    rows: list[Row] = [([10] * num_prompt, [11] * num_output, params) for num_output in range(3)]
    before = random_logits(3)
    after = edit(before, *rows, special=special)
    forces_bos = num_prompt == 1 and (own_bos or model_bos) is not None
    processor = hf.SuppressTokensAtBeginLogitsProcessor([3, 49], num_prompt + forces_bos)
    for row, (prompt, output, _) in enumerate(rows):
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        assert torch.equal(after[row : row + 1], expected)
    assert int(after.isneginf().sum()) == 2


def test_bad_words_equal_transformers() -> None:
    words = [[20], [10, 11], [11, 12, 30], [12, 13, 10, 11], [10] * 30, [EOS], [10, EOS]]
    before, after = edit_all({"bad_words_token_ids": words})
    processor = hf.NoBadWordsLogitsProcessor(words, EOS)
    for row, (prompt, output) in enumerate(SEQUENCES):
        expected = processor(torch.tensor([prompt + output]), before[row : row + 1])
        assert torch.equal(after[row : row + 1], expected)
    assert int(after.isneginf().sum()) > len(SEQUENCES) + 3  # token 20 in every row, and more in some


def test_logit_bias_equals_transformers() -> None:
    bias = {3: 1.5, 10: -100.0, 49: 100.0}
    before, after = edit_all({"logit_bias": bias})
    processor = hf.SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in bias.items()])
    torch.testing.assert_close(after, processor(torch.zeros((len(before), 1), dtype=torch.int64), before))


def test_presence_and_frequency_penalty_count_the_output_only() -> None:
    before, after = edit_all({"presence_penalty": 0.7, "frequency_penalty": -0.3})
    for row, (_, output) in enumerate(SEQUENCES):
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB_SIZE)
        expected = before[row] + 0.3 * counts - 0.7 * (counts > 0)
        torch.testing.assert_close(after[row], expected)


def test_only_allowed_tokens_are_left() -> None:
    before = random_logits(2)
    after = edit(before, ([1], [], {"allowed_token_ids": [3, 9]}), ([1], [], {"allowed_token_ids": [VOCAB_SIZE, 4]}))
    assert torch.nonzero(after.isfinite()).tolist() == [[0, 3], [0, 9], [1, 4]]
    assert after[0, 3] == before[0, 3] and after[1, 4] == before[1, 4]


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"allowed_token_ids": [4, EOS], "min_tokens": 2}, [4]),
        ({"allowed_token_ids": [EOS], "min_tokens": 2}, [EOS]),
        ({"allowed_token_ids": [4, 5], "bad_words_token_ids": [[4], [5]]}, [4, 5]),
        ({"allowed_token_ids": [4, 10], "no_repeat_ngram_size": 1, "bad_words_token_ids": [[4]]}, [10]),
        ({"allowed_token_ids": [4, 5], "suppress_tokens": [4, 5, 6]}, [4, 5]),
        ({"allowed_token_ids": [4, 9], "encoder_no_repeat_ngram_size": 1, "encoder": [4, 9]}, [4, 9]),
    ],
)
def test_a_ban_that_leaves_nothing_is_lifted(params: dict[str, Any], left: list[int]) -> None:
    after = edit(random_logits(1), ([10, 11], [12], params))
    assert torch.nonzero(after[0].isfinite()).flatten().tolist() == left


def test_ids_that_the_model_does_not_have_are_passed_over() -> None:
    params = {"logit_bias": {VOCAB_SIZE: 5}, "bad_words_token_ids": [[VOCAB_SIZE]], "allowed_token_ids": [VOCAB_SIZE]}
    before = random_logits(2)
    assert torch.equal(edit(before, ([1], [], params), ([2], [], {})), before)


def test_what_encoder_and_repetition_penalties_share_is_scaled_by_both_in_transformers_order() -> None:
    """Encoder tokens first: the two penalties divide and multiply in float32, so the order shows in the last bit."""
    before = random_logits(len(SEQUENCES), seed=3)
    params = {"logit_bias": {10: -1.7}, "encoder_repetition_penalty": 1.7, "repetition_penalty": 1.3}
    for row, (prompt, output) in enumerate(SEQUENCES):
        ids, scores = torch.tensor([prompt + output]), before[row : row + 1]
        processors = hf.LogitsProcessorList(
            [
                hf.SequenceBiasLogitsProcessor([[[10], -1.7]]),
                hf.EncoderRepetitionPenaltyLogitsProcessor(1.7, torch.tensor([ENCODERS[row]])),
                hf.RepetitionPenaltyLogitsProcessor(1.3),
            ]
        )
        assert torch.equal(edit(scores, (prompt, output, params | {"encoder": ENCODERS[row]})), processors(ids, scores))


def force(scores: Tensor, params: SamplingParams, num_tokens: int, output: int, special: SpecialTokens) -> Tensor:
    forced = scores.clone()
    limits = np.array([num_tokens]), np.array([output])
    force_scores(forced, [params], *limits, special, np.array([params.max_tokens]))
    return forced


@pytest.mark.parametrize("num_prompt", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize(("own_bos", "model_bos"), [(None, None), (None, 4), (5, 4), (5, None)])
def test_forced_scores_equal_transformers(
    own_bos: int | None, model_bos: int | None, max_tokens: int, num_prompt: int
) -> None:
    special = replace(PLAIN, forced_bos=model_bos, forced_eos=EOS)
    params = SamplingParams(max_tokens=max_tokens, forced_bos_token_id=own_bos)
    bos = model_bos if own_bos is None else own_bos
    processors = hf.LogitsProcessorList([] if bos is None else [hf.ForcedBOSTokenLogitsProcessor(bos)])
    processors.append(hf.ForcedEOSTokenLogitsProcessor(num_prompt + max_tokens, EOS))
    for output in range(max_tokens):
        scores, ids = random_logits(1, seed=output), torch.full((1, num_prompt + output), 10)
        forced = force(scores, params, num_prompt + output, output, special)
        assert torch.equal(forced, processors(ids, scores))


def test_ignore_eos_frees_the_last_token() -> None:
    scores, special = random_logits(1), replace(PLAIN, forced_bos=4, forced_eos=EOS)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    assert torch.equal(force(scores, params, 7, 0, special), scores)
    assert torch.nonzero(force(scores, params, 1, 0, special).isfinite()).tolist() == [[0, 4]]


def dry_penalties(sequence: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """DRY by its definition: for every earlier end of a match, what came next loses by the length of the match."""
    tokens = list(sequence)[-params.dry_range :] if params.dry_range else list(sequence)
    breakers = set(params.dry_sequence_breaker_ids)
    longest: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[-1 - length] and tokens[end - length] not in breakers:
            length += 1
        if length and tokens[end + 1] not in breakers:
            longest[tokens[end + 1]] = max(length, longest.get(tokens[end + 1], 0))
    return {
        token_id: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token_id, length in longest.items()
        if length >= params.dry_allowed_length
    }


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"dry_allowed_length": 1, "dry_base": 1.1},
        {"dry_allowed_length": 0, "dry_multiplier": 2.0},
        {"dry_range": 6, "dry_allowed_length": 1},
        {"dry_sequence_breaker_ids": [12], "dry_allowed_length": 1},
        {"dry_sequence_breaker_ids": [10, 13], "dry_range": 9, "dry_allowed_length": 1},
    ],
)
def test_dry_is_what_its_definition_says(params: dict[str, Any]) -> None:
    params = {"dry_multiplier": 0.8, **params}
    before, after = edit_all(params)
    num_penalised = 0
    for row, (prompt, output) in enumerate(SEQUENCES):
        expected = before[row].clone()
        for token_id, penalty in dry_penalties(prompt + output, SamplingParams(**params)).items():
            expected[token_id] -= penalty
            num_penalised += 1
        torch.testing.assert_close(after[row], expected)
    assert num_penalised > 3


@pytest.mark.parametrize("params", [{"dry_base": 5.0, "dry_multiplier": 1e6}, {"dry_base": 1.0001}])
def test_dry_of_a_very_long_match_stays_finite(params: dict[str, Any]) -> None:
    before = random_logits(1)
    after = edit(before, ([10] * 590, [], {"dry_multiplier": 1.0, **params}))
    assert after.isfinite().all() and MAX_DRY_LENGTH < 590
    assert before[0, 10] - after[0, 10] > 1.0


def test_order_is_bias_repetition_frequency_presence_dry() -> None:
    params: dict[str, Any] = {
        "logit_bias": {10: 4.0},
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
        "dry_multiplier": 1.0,
        "dry_allowed_length": 2,
    }
    after = edit(torch.zeros((1, VOCAB_SIZE)), ([5, 6, 10], [10, 5, 6], params))
    assert after[0, 10].item() == 4.0 / 2.0 - 0.5 - 0.25 - 1.0


ALL_KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"bad_words_token_ids": [[10, 11], [12]]},
    {"logit_bias": {10: 3.0}},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"allowed_token_ids": [10, 11, 12]},
    {"dry_multiplier": 0.7, "dry_allowed_length": 1},
    {"dry_multiplier": 0.7, "dry_range": 5, "dry_sequence_breaker_ids": [11]},
    {"min_tokens": 16, "stop_token_ids": [10]},
    {"encoder_repetition_penalty": 1.5, "encoder": [10, 30, 31]},
    {"encoder_no_repeat_ngram_size": 1, "encoder": [10, 11, 12, 13, 14]},
    {"encoder_no_repeat_ngram_size": 2, "encoder": [10, 10, 11, 11, 10, 40]},
    {"suppress_tokens": [10, 11]},
]


def test_a_row_is_edited_alike_alone_and_beside_every_other_kind() -> None:
    logits = random_logits(len(ALL_KINDS))
    rows: list[Row] = [
        (random_tokens(2 + 3 * index, index, kinds=2), random_tokens(12 - index, 50 + index, kinds=2), params)
        for index, params in enumerate(ALL_KINDS)
    ]
    together = edit(logits, *rows)
    for index, row in enumerate(rows):
        assert torch.equal(edit(logits[index : index + 1], row)[0], together[index])
        assert not torch.equal(together[index], logits[index])
