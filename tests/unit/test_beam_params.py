from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trivium import BeamSearchParams
from trivium.errors import InvalidRequestError
from trivium.params import BeamSettings, SamplingParams


def refused(**params: Any) -> str | None:
    """The parameter that is named, which must be in the message, too."""
    with pytest.raises(InvalidRequestError) as info:
        BeamSearchParams(**params)
    assert info.value.param is not None and info.value.param in info.value.message
    return info.value.param


def test_width_and_max_tokens_are_enough_and_one_hypothesis_is_returned() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=50)
    expected = SamplingParams(n=1, temperature=0.0, max_tokens=50, beam=BeamSettings(width=4))
    assert params.to_sampling_params() == expected


def test_every_parameter_reaches_the_engine() -> None:
    beam: dict[str, Any] = {"length_penalty": 2.0, "early_stopping": "never", "diversity_penalty": 0.5}
    same: dict[str, Any] = {
        "ignore_eos": True,
        "min_tokens": 3,
        "max_tokens": None,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "encoder_repetition_penalty": 1.1,
        "encoder_no_repeat_ngram_size": 4,
        "bad_words": ["foo"],
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [3],
        "forced_bos_token_id": 9,
        "allowed_token_ids": [5, 6],
        "stop": "end",
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 2,
    }
    params = BeamSearchParams(beam_width=6, num_beam_groups=3, num_return_sequences=5, **beam, **same)
    expected = SamplingParams(n=5, temperature=0.0, beam=BeamSettings(width=6, num_groups=3, **beam), **same)
    assert params.to_sampling_params() == expected
    unset = SamplingParams(temperature=0.0, max_tokens=1)
    assert all(getattr(expected, name) != getattr(unset, name) for name in same)


def test_lists_become_tuples_so_that_nobody_can_change_them() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=5, suppress_tokens=[1, 1, 2], stop="x")  # type: ignore[arg-type]
    assert (params.suppress_tokens, params.stop) == ((1, 2), ("x",))
    assert hash(params) == hash(replace(params))


def test_names_of_transformers_are_taken() -> None:
    params = BeamSearchParams(num_beams=4, max_new_tokens=50, min_new_tokens=3)
    assert params == BeamSearchParams(beam_width=4, max_tokens=50, min_tokens=3)
    assert params == BeamSearchParams(num_beams=4, beam_width=4, max_tokens=50, max_new_tokens=50, min_tokens=3)
    assert replace(params, beam_width=2).beam_width == 2


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"min_tokens": 1, "min_new_tokens": 2}, "min_new_tokens"),
        ({"max_length": 3}, "max_length"),
        ({"min_tokens": 1, "min_length": 2}, "min_length"),
    ],
)
def test_two_names_with_two_values_are_refused(params: dict[str, Any], name: str) -> None:
    assert refused(**{"beam_width": 4, "max_tokens": 8, **params}) == name


@pytest.mark.parametrize("params", [{"max_tokens": 5}, {"beam_width": 4}, {"num_beams": 4, "min_length": 2}])
def test_width_and_a_limit_are_required(params: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="max_tokens" if "max_tokens" not in params else "beam_width"):
        BeamSearchParams(**params)


@pytest.mark.parametrize("name", ["top_p", "n", "seed", "do_sample"])
def test_unknown_names_are_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        BeamSearchParams(beam_width=2, max_tokens=5, **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"beam_width": 17}, "beam_width"),
        ({"beam_width": 0}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"num_return_sequences": 5}, "num_return_sequences"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"length_penalty": "2"}, "length_penalty"),
        ({"num_beam_groups": 3}, "num_beam_groups"),
        ({"diversity_penalty": 0.5}, "diversity_penalty"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"encoder_repetition_penalty": 0}, "encoder_repetition_penalty"),
    ],
)
def test_a_bad_value_is_refused_by_name(params: dict[str, Any], name: str) -> None:
    assert refused(**{"beam_width": 4, "max_tokens": 8, **params}) == name


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"num_beams": 17, "max_tokens": 8}, "num_beams"),
        ({"beam_width": 2, "max_new_tokens": 0}, "max_new_tokens"),
        ({"beam_width": 2, "max_tokens": 8, "min_new_tokens": 9}, "min_new_tokens"),
        ({"beam_width": 2, "max_length": 1}, "max_length"),
        ({"beam_width": 2, "max_tokens": 8, "min_length": -1}, "min_length"),
    ],
)
def test_an_error_names_the_name_that_was_given(params: dict[str, Any], name: str) -> None:
    assert refused(**params) == name


def test_lengths_count_the_prompt() -> None:
    params = BeamSearchParams(num_beams=4, max_length=142, min_length=56)
    for num_prompt_tokens, max_tokens, min_tokens in ((1, 141, 55), (60, 82, 0), (141, 1, 0)):
        sampling = params.to_sampling_params(num_prompt_tokens=num_prompt_tokens)
        assert (sampling.max_tokens, sampling.min_tokens) == (max_tokens, min_tokens)
    same = BeamSearchParams(num_beams=4, max_tokens=141, min_tokens=55)
    assert params.to_sampling_params(num_prompt_tokens=1) == same.to_sampling_params()


@pytest.mark.parametrize(
    ("params", "num_prompt_tokens", "name"),
    [
        ({"max_length": 20}, None, "max_length"),
        ({"max_tokens": 20, "min_length": 5}, None, "min_length"),
        ({"max_length": 20}, 20, "max_length"),
        ({"max_tokens": 4, "min_length": 9}, 2, "min_length"),
    ],
)
def test_lengths_that_cannot_be_told_are_refused(
    params: dict[str, Any], num_prompt_tokens: int | None, name: str
) -> None:
    beam = BeamSearchParams(beam_width=2, **params)
    with pytest.raises(InvalidRequestError, match=name) as info:
        beam.to_sampling_params(num_prompt_tokens=num_prompt_tokens)
    assert info.value.param == name
