from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium.params import SamplingParams
from trivium.sampling_tokens import check_sampling_tokens, resolve_bad_words

INFO = ModelInfo("m", "A", False, 10, 20, 30, "float32", 16, 99, 4, 8)
ENCODER_DECODER = replace(INFO, is_encoder_decoder=True)


class Letters:
    """One token per character; "!" has none."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        assert not add_special_tokens
        self.num_calls += 1
        return [[ord(char) % 32 for char in text.replace("!", "")] for text in texts]


def resolve(encoder: Letters, **params: Any) -> SamplingParams:
    return asyncio.run(resolve_bad_words(SamplingParams(**params), encoder))


def test_each_word_is_tokenized_with_and_without_a_space_in_one_call() -> None:
    encoder = Letters()
    params = resolve(encoder, bad_words=["ab", " c"], temperature=0.5)
    assert params.bad_words_token_ids == ((1, 2), (0, 1, 2), (3,), (0, 3))
    assert (params.bad_words, params.temperature, encoder.num_calls) == (("ab", " c"), 0.5, 1)


def test_words_that_are_resolved_and_no_words_ask_nothing() -> None:
    encoder = Letters()
    resolved = resolve(encoder, bad_words=["ab"])
    assert asyncio.run(resolve_bad_words(resolved, encoder)) is resolved
    assert resolve(encoder) == SamplingParams() and encoder.num_calls == 1


def test_a_word_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as info:
        resolve(Letters(), bad_words=["!"])
    assert info.value.param == "bad_words"


@pytest.mark.parametrize(
    ("params", "param", "code"),
    [
        ({"stop_token_ids": [30]}, "stop_token_ids[0]", "invalid_token_id"),
        ({"allowed_token_ids": [1, 30]}, "allowed_token_ids[1]", "invalid_token_id"),
        ({"dry_sequence_breaker_ids": [31]}, "dry_sequence_breaker_ids[0]", "invalid_token_id"),
        ({"bad_words_token_ids": [[1], [2, 30]]}, "bad_words_token_ids[1]", "invalid_token_id"),
        ({"logit_bias": {30: 1}}, "logit_bias", "invalid_logit_bias"),
        ({"suppress_tokens": [30]}, "suppress_tokens[0]", "invalid_token_id"),
        ({"begin_suppress_tokens": [0, 30]}, "begin_suppress_tokens[1]", "invalid_token_id"),
        ({"forced_bos_token_id": 30}, "forced_bos_token_id", "invalid_token_id"),
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused(params: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as info:
        check_sampling_tokens(SamplingParams(**params), ENCODER_DECODER)
    assert (info.value.param, info.value.code) == (param, code)


@pytest.mark.parametrize(
    "params", [{"encoder_repetition_penalty": 1.2}, {"encoder_no_repeat_ngram_size": 2}, {"forced_bos_token_id": 0}]
)
def test_what_needs_an_encoder_is_refused_by_a_decoder_only_model(params: dict[str, Any]) -> None:
    check_sampling_tokens(SamplingParams(**params), ENCODER_DECODER)
    with pytest.raises(InvalidRequestError) as info:
        check_sampling_tokens(SamplingParams(**params), INFO)
    assert (info.value.param, info.value.code) == (next(iter(params)), "not_encoder_decoder")


def test_tokens_of_the_vocabulary_are_taken() -> None:
    check_sampling_tokens(SamplingParams(allowed_token_ids=(29,), logit_bias={29: 1}, stop_token_ids=(0,)), INFO)
