"""How a request and a checkpoint's defaults become parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from toy import make_info
from trivium.config import GenerationDefaults, ModelInfo
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import (
    ResolvedSampling,
    default_sampling_params,
    resolve_sampling,
    with_necessities,
)
from trivium.inputs import EncodedPrompt
from trivium.params import BeamSettings, SamplingParams


def encoder_decoder(**defaults: Any) -> ModelInfo:
    info = make_info(is_encoder_decoder=True, max_encoder_len=20, decoder_start_token_id=0, max_model_len=200)
    return replace(info, generation_defaults=GenerationDefaults(**defaults))


def decoder_only(**defaults: Any) -> ModelInfo:
    return replace(make_info(max_model_len=200), generation_defaults=GenerationDefaults(**defaults))


def resolve(
    info: ModelInfo, given: dict[str, Any] | None = None, *, num_prompt_tokens: int = 1, fallback: int | None = 100
) -> ResolvedSampling:
    encoder = (5,) if info.is_encoder_decoder else None
    prompt = EncodedPrompt((0,) * num_prompt_tokens, encoder_token_ids=encoder)
    return resolve_sampling(given or {}, prompt, info, fallback_max_tokens=fallback)


@pytest.mark.parametrize(
    ("defaults", "given", "num_prompt_tokens", "expected"),
    [
        ({}, {}, 1, (100, 0)),
        ({"max_length": 62, "min_length": 11}, {}, 1, (61, 10)),
        ({"max_length": 62, "min_length": 11}, {}, 5, (57, 6)),
        ({"max_length": 62, "min_length": 11}, {}, 20, (42, 0)),
        ({"max_length": 62, "max_new_tokens": 30, "min_length": 9, "min_new_tokens": 4}, {}, 5, (30, 4)),
        ({"max_length": 62}, {"max_tokens": 7}, 1, (7, 0)),
        ({"max_length": 62}, {"max_tokens": 150}, 1, (150, 0)),
        ({"max_length": 62}, {"max_length": 30, "min_length": 20}, 5, (25, 15)),
        ({"max_length": 62}, {"max_tokens": None}, 50, (150, 0)),
        ({"max_length": 62, "min_length": 11}, {"max_tokens": 4}, 1, (4, 4)),
        ({"max_length": 62, "min_length": 11}, {"min_tokens": 0}, 1, (61, 0)),
        ({"max_length": 500}, {}, 1, (199, 0)),
        ({"max_new_tokens": 500}, {}, 150, (50, 0)),
    ],
)
def test_lengths_of_an_encoder_decoder_model(
    defaults: dict[str, int], given: dict[str, Any], num_prompt_tokens: int, expected: tuple[int, int]
) -> None:
    sampling = resolve(encoder_decoder(**defaults), given, num_prompt_tokens=num_prompt_tokens).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == expected


def test_a_decoder_only_model_takes_new_tokens_but_no_total_length() -> None:
    sampling = resolve(decoder_only(max_length=20, min_length=10, max_new_tokens=33, min_new_tokens=3)).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (33, 3)
    assert resolve(decoder_only(max_length=20)).sampling.max_tokens == 100


def test_no_fallback_is_the_room_that_is_left() -> None:
    assert resolve(decoder_only(), fallback=None, num_prompt_tokens=50).sampling.max_tokens == 150


@pytest.mark.parametrize(
    ("defaults", "given", "temperature", "beam"),
    [
        ({}, {}, 0.0, None),
        ({"temperature": 0.6}, {}, 0.0, None),
        ({"do_sample": True}, {}, 1.0, None),
        ({"do_sample": True, "temperature": 0.6}, {}, 0.6, None),
        ({"do_sample": True, "num_beams": 4}, {}, 1.0, None),
        ({"num_beams": 1}, {}, 0.0, None),
        ({"num_beams": 4}, {}, 0.0, BeamSettings(width=4)),
        ({"num_beams": 4}, {"temperature": 0}, 0.0, BeamSettings(width=4)),
        ({"num_beams": 4}, {"temperature": 0.8}, 0.8, None),
        ({"num_beams": 4}, {"num_beams": 1}, 0.0, None),
        ({"num_beams": 4}, {"beam": None}, 0.0, None),
        ({"num_beams": 4}, {"beam": BeamSettings(width=2)}, 0.0, BeamSettings(width=2)),
        (
            {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
            {"num_beams": 2},
            0.0,
            BeamSettings(width=2, length_penalty=2.0, early_stopping="never"),
        ),
        (
            {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
            {"length_penalty": 0.5, "early_stopping": False},
            0.0,
            BeamSettings(width=4, length_penalty=0.5),
        ),
    ],
)
def test_an_encoder_decoder_model_samples_only_if_told_to(
    defaults: dict[str, Any], given: dict[str, Any], temperature: float, beam: BeamSettings | None
) -> None:
    sampling = resolve(encoder_decoder(**defaults), given).sampling
    assert (sampling.temperature, sampling.beam) == (temperature, beam)


@pytest.mark.parametrize(
    ("defaults", "given", "expected"),
    [
        ({}, {}, (1.0, 0, 1.0)),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "num_beams": 4}, {}, (0.6, 20, 0.95)),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.9, "top_p": 0.5}, (0.9, 20, 0.5)),
        ({"do_sample": False, "top_k": 20}, {}, (1.0, 20, 1.0)),
        ({"do_sample": True}, {}, (1.0, 0, 1.0)),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.0}, (0.0, 0, 1.0)),
    ],
)
def test_a_decoder_only_model_samples_with_what_the_file_says(
    defaults: dict[str, Any], given: dict[str, Any], expected: tuple[float, int, float]
) -> None:
    sampling = resolve(decoder_only(**defaults), given).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected and sampling.beam is None


def test_do_sample_alone_means_the_top_k_of_transformers() -> None:
    assert resolve(encoder_decoder(do_sample=True)).sampling.top_k == 50
    assert resolve(encoder_decoder(do_sample=True, top_k=0)).sampling.top_k == 0
    assert resolve(encoder_decoder(do_sample=True), {"top_k": 7}).sampling.top_k == 7


def test_penalties_are_filled_and_those_of_the_encoder_only_where_there_is_one() -> None:
    defaults = {
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "encoder_no_repeat_ngram_size": 4,
        "encoder_repetition_penalty": 1.1,
    }
    sampling = resolve(encoder_decoder(**defaults), {"repetition_penalty": 1.0}).sampling
    assert {name: getattr(sampling, name) for name in defaults} == defaults | {"repetition_penalty": 1.0}
    sampling = resolve(decoder_only(**defaults)).sampling
    assert (sampling.no_repeat_ngram_size, sampling.repetition_penalty) == (3, 1.2)
    assert (sampling.encoder_no_repeat_ngram_size, sampling.encoder_repetition_penalty) == (0, 1.0)


def test_what_was_applied_is_told_in_the_words_of_the_file() -> None:
    info = encoder_decoder(num_beams=4, max_length=62, min_length=5, no_repeat_ngram_size=3, top_k=9)
    assert resolve(info, {"no_repeat_ngram_size": 2}).applied == {"num_beams": 4, "max_length": 62, "min_length": 5}
    assert resolve(decoder_only(temperature=0.6, top_k=9), {"top_k": 3}).applied == {"temperature": 0.6}


@pytest.mark.parametrize(
    ("defaults", "given", "num_prompt_tokens", "param"),
    [
        ({}, {"min_length": 9, "max_length": 8}, 1, "min_length"),
        ({}, {"min_tokens": 9, "max_tokens": 8}, 1, "min_tokens"),
        ({"max_length": 20}, {"min_tokens": 30}, 1, "min_tokens"),
        ({}, {"min_length": 9, "min_tokens": 8}, 1, "min_length"),
        ({}, {"max_length": 5}, 5, "max_length"),
        ({}, {"max_length": True}, 1, "max_length"),
        ({"max_length": 20}, {}, 20, "decoder_prompt"),
        ({}, {"length_penalty": 2.0}, 1, "length_penalty"),
        ({}, {"num_beams": 17}, 1, "num_beams"),
        ({}, {"num_beams": 2, "temperature": 0.5}, 1, "temperature"),
        ({"num_beams": 2}, {"n": 3}, 1, "n"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(
    defaults: dict[str, Any], given: dict[str, Any], num_prompt_tokens: int, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        resolve(encoder_decoder(**defaults), given, num_prompt_tokens=num_prompt_tokens)
    assert raised.value.param == param


def test_necessities_join_what_a_request_bans() -> None:
    info = encoder_decoder(suppress_tokens=(7, 8), begin_suppress_tokens=(9,), bad_words_ids=((5,), (5, 6)))
    given = SamplingParams(suppress_tokens=(8, 3), bad_words_token_ids=((1, 2),))
    sampling = with_necessities(given, EncodedPrompt((0,), forced_bos_token_id=4), info)
    assert set(sampling.suppress_tokens) == {3, 7, 8} and sampling.begin_suppress_tokens == (9,)
    assert sampling.bad_words_token_ids == ((1, 2), (5,), (5, 6)) and sampling.forced_bos_token_id == 4


def test_a_forced_token_that_is_not_the_target_languages_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        with_necessities(
            SamplingParams(forced_bos_token_id=5), EncodedPrompt((0,), forced_bos_token_id=4), encoder_decoder()
        )
    assert raised.value.param == "forced_bos_token_id"


def test_default_sampling_params_are_those_of_the_shortest_prompt() -> None:
    params = default_sampling_params(encoder_decoder(max_length=62, num_beams=4))
    assert (params.max_tokens, params.temperature, params.beam) == (61, 0.0, BeamSettings(width=4))
    assert default_sampling_params(decoder_only()) == SamplingParams()
