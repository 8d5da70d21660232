"""Rows that are split over ranks answer as whole rows do: reductions, top k, draws, and all that a sampler does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ranks import ThreadRanks
from trivium.errors import ConfigurationError
from trivium.executor.history import History
from trivium.executor.input_batch import BatchLimits, InputBatch
from trivium.executor.logits_processors import edit_logits, force_scores
from trivium.executor.logprobs import token_logprobs
from trivium.executor.model_config import SpecialTokens
from trivium.executor.parallel.shard import Shard, part_of_vocabulary
from trivium.executor.sampler import Sampler
from trivium.executor.vocabulary import WHOLE, SplitVocabulary, Vocabulary
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput

NUM_RANKS = 3
SPECIAL = SpecialTokens(eos=(7,), bos=None, pad=None, decoder_start=None, forced_bos=None, forced_eos=None)
SIZES = (96, 260, 1000)  # of 3, 9 and 32 units


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(NUM_RANKS)
    yield ranks
    ranks.close()


def everywhere(ranks: ThreadRanks, whole: Tensor, ask: Callable[[Tensor, Vocabulary], Any]) -> list[Any]:
    """What each rank says of its part of `whole` [num_rows, size]."""

    def work(communicator: Any) -> Any:
        vocabulary = SplitVocabulary(Shard(communicator), whole.shape[1])
        return ask(vocabulary.own(whole).clone(), vocabulary)

    return ranks.run(work)


def random_rows(num_rows: int, size: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn((num_rows, size), generator=torch.Generator().manual_seed(seed))


def test_every_token_has_one_rank_and_every_rank_whole_words_of_a_mask() -> None:
    for vocab_size in (96, 97, 260, 1000, 32000, 50257, 151936):
        for size in (1, 2, 3):
            parts = [part_of_vocabulary(vocab_size, rank, size) for rank in range(size)]
            assert [token for part in parts for token in part] == list(range(vocab_size))
            assert all(part.start % 32 == 0 and len(part) > 0 for part in parts)
            assert max(map(len, parts)) - min(map(len, parts)) <= 64
    with pytest.raises(ConfigurationError, match="tensor_parallel_size 3 is too large for a vocabulary of 64 tokens"):
        part_of_vocabulary(64, 0, 3)


# name -> what is asked of rows
QUESTIONS: dict[str, Callable[[Tensor, Vocabulary], Tensor]] = {
    "argmax": lambda x, v: v.argmax(x),
    "amax": lambda x, v: v.amax(x),
    "logsumexp": lambda x, v: v.logsumexp(x),
    "sum": lambda x, v: v.sum(x.exp()),
    "count": lambda x, v: v.sum(x > 0.5),
    "pick": lambda x, v: v.pick(x, torch.tensor([0, 95, 33, 64, 31, 32])),
    "top_3": lambda x, v: torch.stack(v.top_k(x, 3)),
    "top_96": lambda x, v: torch.stack(v.top_k(x, 96)),
    "gather": lambda x, v: v.gather(x),
    "softmax": lambda x, v: v.gather(v.softmax(x)),
    "log_softmax": lambda x, v: v.gather(v.log_softmax(x)),
    "draw": lambda x, v: v.draw(x.exp(), torch.tensor([1e-9, 0.2, 0.4, 0.6, 0.8, 1 - 1e-9], dtype=torch.float64)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_split_row_answers_as_a_whole_one(ranks: ThreadRanks, name: str, size: int) -> None:
    rows, ask = random_rows(6, size), QUESTIONS[name]
    expected = ask(rows, WHOLE)
    found = everywhere(ranks, rows, ask)
    assert all(torch.equal(other, found[0]) for other in found)  # with the same bits on every rank
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)


def test_of_equals_the_first_is_the_largest(ranks: ThreadRanks) -> None:
    rows = torch.zeros((4, 260))
    rows[1, 70:] = 1.0
    rows[2, [200, 259]] = 1.0
    rows[3] = -torch.inf
    expected = WHOLE.argmax(rows).tolist()
    assert expected == [0, 70, 200, 0]
    assert [found.tolist() for found in everywhere(ranks, rows, lambda x, v: v.argmax(x))] == [expected] * NUM_RANKS


def test_no_banned_token_is_drawn(ranks: ThreadRanks) -> None:
    """Rounding carries no number past the last token with a weight, and ranks without any are passed over."""
    weights = torch.zeros((300, 96))
    kept = torch.randint(0, 96, (300, 2), generator=torch.Generator().manual_seed(1))
    weights.scatter_(1, kept, torch.rand((300, 2), generator=torch.Generator().manual_seed(2)) + 1e-3)
    uniform = torch.cat(
        (torch.rand(298, dtype=torch.float64), torch.tensor([2.0**-49, 1 - 2.0**-49], dtype=torch.float64))
    )
    expected = WHOLE.draw(weights, uniform)
    for found in everywhere(ranks, weights, lambda x, v: v.draw(x, uniform)):
        assert torch.equal(found, expected) and bool((weights.gather(1, found[:, None]) > 0).all())


_SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_k": 600, "top_p": 0.99},
    {"temperature": 2.0, "top_p": 0.999},  # no shortlist holds that much
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "min_p": 0.02, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.0, "top_a": 0.5, "top_k": 30},
    {"temperature": 1.0, "epsilon_cutoff": 20, "eta_cutoff": 40},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.01, "top_p": 0.9},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {5: 8.0, 77: 8.0}},
    {"temperature": 1.0, "allowed_token_ids": (4, 5, 90), "min_p": 0.1},
    {"temperature": 0.0, "allowed_token_ids": (80, 95)},
    {"temperature": 0.8, "min_tokens": 40, "stop_token_ids": (90,)},
]


def limits(size: int) -> BatchLimits:
    return BatchLimits(
        max_num_seqs=64,
        max_num_batched_tokens=64,
        max_model_len=64,
        max_encoder_len=32,
        num_blocks=64,
        block_size=4,
        vocab_size=size,
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_sampler_says_the_same(ranks: ThreadRanks, size: int) -> None:
    rows = [{**params, "seed": seed} for params in _SAMPLED for seed in range(3)]
    logits = random_rows(len(rows), size, seed=3)

    def sample(own: Tensor, vocabulary: Vocabulary) -> list[int]:
        batch = InputBatch(limits(size))
        requests = [SamplingParams(max_tokens=40, **params) for params in rows]
        batch.apply(
            SchedulerOutput(
                0,
                new_requests=tuple(
                    NewRequestData(slot, (1, 2, 90), (5, 77, 5), 0, (), params, 0, 40)
                    for slot, params in enumerate(requests)
                ),
            )
        )
        tokens: list[int] = Sampler(SPECIAL, vocabulary).sample(own, batch, np.arange(len(rows))).tolist()
        return tokens

    expected = sample(logits.clone(), WHOLE)
    assert everywhere(ranks, logits, sample) == [expected] * NUM_RANKS


_EDITED: list[dict[str, Any]] = [
    {"logit_bias": {3: 2.0, 40: -100.0, 95: 1.5, 4000: 1.0}},
    {"allowed_token_ids": (3, 40, 95, 4000)},
    {"allowed_token_ids": (4000,)},  # none that the model has: nothing is left out
    {"bad_words_token_ids": ((5, 77), (94,), (40, 5, 77, 8), (4000,))},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breaker_ids": (2,)},
    {"encoder_repetition_penalty": 1.7, "encoder_no_repeat_ngram_size": 1},
    {"suppress_tokens": (1, 33, 65, 4000), "min_tokens": 9},
    {"suppress_tokens": tuple(range(95)), "bad_words_token_ids": ((95,),)},  # in the end everything: that ban is lifted
    {"begin_suppress_tokens": (5, 50, 94)},
]


@pytest.mark.parametrize("size", SIZES)
def test_edited_logits_are_the_parts_of_edited_rows(ranks: ThreadRanks, size: int) -> None:
    params = [SamplingParams(**given) for given in _EDITED]
    batch = InputBatch(limits(size))
    encoder = (9, 40, 41, 94, 9)
    new = [
        NewRequestData(slot, (2, 40, 5, 77, 8), (90, 40, 5, 77) if slot < 11 else (), 0, (), row, 0, 16, encoder)
        for slot, row in enumerate(params)
    ]
    batch.apply(SchedulerOutput(0, new_requests=tuple(new)))
    history = History.of(batch, np.arange(len(params)))
    logits = random_rows(len(params), size, seed=4)

    def edit(own: Tensor, vocabulary: Vocabulary) -> Tensor:
        edit_logits(own, params, history, SPECIAL, vocabulary)
        return vocabulary.gather(own)

    expected = edit(logits.clone(), WHOLE)
    assert not torch.equal(expected, logits)
    assert all(torch.equal(found, expected) for found in everywhere(ranks, logits, edit))


def test_a_forced_token_is_the_only_one_on_whichever_rank_it_is(ranks: ThreadRanks) -> None:
    special = replace(SPECIAL, forced_eos=7)
    params = [SamplingParams(max_tokens=5, forced_bos_token_id=token) for token in (3, 50, 95, 95)]
    num_tokens, positions = np.array([1, 1, 1, 9]), np.array([0, 0, 0, 4])
    scores = random_rows(4, 96)

    def force(own: Tensor, vocabulary: Vocabulary) -> Tensor:
        max_tokens = np.full(4, 5)
        force_scores(own, params, num_tokens, positions, special, max_tokens, start=vocabulary.start)
        return vocabulary.gather(own)

    expected = force(scores.clone(), WHOLE)
    assert expected.isfinite().nonzero().tolist() == [[0, 3], [1, 50], [2, 95], [3, 7]]
    assert all(torch.equal(found, expected) for found in everywhere(ranks, scores, force))


@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_and_ranks_of_tokens_are_the_same(ranks: ThreadRanks, size: int) -> None:
    logits, token_ids = random_rows(5, size, seed=6), np.array([0, 40, 95, 64, 31])
    num_top = [0, 3, 20, 1, 5]
    expected = token_logprobs(logits, token_ids, num_top)
    for found in everywhere(ranks, logits, lambda x, v: token_logprobs(x, token_ids, num_top, v)):
        assert [(item.rank, item.top_ids) for item in found] == [(item.rank, item.top_ids) for item in expected]
        values = [[item.logprob, *item.top_logprobs] for item in found]
        for value, item in zip(values, expected, strict=True):
            assert value == pytest.approx([item.logprob, *item.top_logprobs], abs=1e-5)
