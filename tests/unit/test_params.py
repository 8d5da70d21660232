import math
from typing import Any

import pytest

from trivium.errors import InvalidRequestError
from trivium.params import REFUSED_SAMPLING, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("top_k", 10**12),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 1.2),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
        ("best_of", 0),
        ("best_of", 17),
        ("best_of", 2.0),
        ("presence_penalty", 2.01),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", None),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 257),
        ("no_repeat_ngram_size", True),
        ("logit_bias", [1]),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1: None}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", ["  "]),
        ("bad_words", [5]),
        ("bad_words", ["x" * 257]),
        ("bad_words", ["x"] * 129),
        ("bad_words_token_ids", [[]]),
        ("bad_words_token_ids", [5]),
        ("bad_words_token_ids", [[-1]]),
        ("bad_words_token_ids", [[1]] * 257),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 5),
        ("allowed_token_ids", [1] * 16385),
        ("typical_p", 1.1),
        ("top_a", -0.1),
        ("epsilon_cutoff", -1),
        ("eta_cutoff", 10001),
        ("dry_multiplier", -0.1),
        ("dry_multiplier", math.inf),
        ("dry_base", 1.0),
        ("dry_allowed_length", -1),
        ("dry_allowed_length", 257),
        ("dry_range", -1),
        ("dry_sequence_breaker_ids", ["x"]),
        ("xtc_threshold", 1.5),
        ("xtc_probability", -0.5),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as info:
        SamplingParams(**{name: value})
    assert info.value.param == name and name in info.value.message


def test_defaults_and_normal_forms() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[3, 3, 4], top_k=-1)  # type: ignore[arg-type]
    assert params.stop == ("x",) and params.stop_token_ids == (3, 4) and params.top_k == 0
    assert (SamplingParams().max_tokens, SamplingParams().temperature) == (16, 1.0)


def test_lists_and_biases_have_one_form() -> None:
    params = SamplingParams(
        logit_bias={5: 2}, allowed_token_ids=[3, 4, 3], bad_words=["a", "b", "a"], bad_words_token_ids=[[1, 2], [1, 2]]
    )  # type: ignore[arg-type]
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == ({5: 2.0}, (3, 4), ("a", "b"))
    assert params.bad_words_token_ids == ((1, 2),)
    nothing = SamplingParams(logit_bias=None, bad_words=None, dry_sequence_breaker_ids=None)  # type: ignore[arg-type]
    assert nothing == SamplingParams() and hash(nothing) == hash(SamplingParams())


def test_a_bias_that_is_wrong_has_a_code_of_its_own() -> None:
    with pytest.raises(InvalidRequestError) as info:
        SamplingParams(logit_bias={1: 101})
    assert info.value.code == "invalid_logit_bias"


def test_best_of_is_at_least_n_and_picks_only_where_choices_differ() -> None:
    assert SamplingParams(n=2, best_of=5, temperature=0.0).best_of == 5
    assert SamplingParams(n=2, best_of=2).best_of == 2
    with pytest.raises(InvalidRequestError, match="best_of"):
        SamplingParams(n=3, best_of=2, temperature=0.0)
    assert SamplingParams(n=2, best_of=3).picks_best
    assert not SamplingParams(n=2, best_of=2).picks_best and not SamplingParams(best_of=3, temperature=0.0).picks_best


def test_a_tiny_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=1e-9).is_greedy and not SamplingParams(temperature=0.01).is_greedy


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize("name", REFUSED_SAMPLING)
def test_what_has_no_meaning_here_is_refused_by_name(name: str) -> None:
    unused, reason = REFUSED_SAMPLING[name]
    for value in unused:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**{name: 7})  # type: ignore[arg-type]
    assert refused.value.param == name and name in refused.value.message and reason in refused.value.message


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None and SamplingParams(seed=-2).seed == -2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", True),
        ("truncation_side", "middle"),
        ("output_kind", 1),
    ],
)
def test_front_door_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name
