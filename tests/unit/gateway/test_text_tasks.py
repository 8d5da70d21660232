"""Translations and summarizations, and how a checkpoint's defaults fill requests, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from trivium.config import GenerationDefaults
from trivium.params import BeamSettings
from unit.gateway.fakes import DECODER_START, MAX_ENCODER_LEN, FakeEngine, RunningServer, make_info, post

TRANSLATIONS, SUMMARIZATIONS = "/v1/translations", "/v1/summarizations"
DEFAULTS = GenerationDefaults(
    max_length=142, min_length=56, num_beams=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3
)
APPLIED = {
    "num_beams": 4,
    "length_penalty": 2.0,
    "early_stopping": True,
    "no_repeat_ngram_size": 3,
    "max_length": 142,
    "min_length": 56,
}


class Server:
    """A gateway with a model of each kind."""

    def __init__(self) -> None:
        many, bart = (make_info(name, is_encoder_decoder=True) for name in ("many", "bart"))
        self.many = FakeEngine(many)
        self.bart = FakeEngine(replace(bart, generation_defaults=DEFAULTS))
        engines = {"many": self.many, "bart": self.bart, "tiny": FakeEngine(make_info("tiny"))}
        self.running = RunningServer(engines)

    def post(self, path: str, **fields: Any) -> Any:
        return post(self.running.port, path, fields)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.running.stop()


def test_a_translation_has_one_result_for_each_input(server: Server) -> None:
    answer = server.post(TRANSLATIONS, model="many", input=["a", "bc"], source_language="de", target_language="fr")
    assert answer.status == 200
    body = answer.json
    assert (body["object"], body["model"], body["id"][:6]) == ("translation", "many", "trans-")
    assert [(item["index"], item["input_index"], item["text"]) for item in body["results"]] == [
        (0, 0, "Hello world"),
        (1, 1, "Hello world"),
    ]
    assert all(item["finish_reason"] == "stop" for item in body["results"])
    cached = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11} | cached
    assert "applied_defaults" not in body
    request = server.many.requests[-1]
    assert request.sampling.forced_bos_token_id == 257 and request.sampling.is_greedy
    assert request.prompt.token_ids == (DECODER_START,) and request.sampling.max_tokens == 256


def test_several_choices_name_their_input(server: Server) -> None:
    results = server.post(SUMMARIZATIONS, model="bart", input=["a", "b"], n=2).json["results"]
    assert [(item["index"], item["input_index"]) for item in results] == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_a_summarization_takes_what_the_checkpoint_says(server: Server) -> None:
    body = server.post(SUMMARIZATIONS, model="bart", input="a long text", debug=True).json
    assert body["object"] == "summarization" and body["applied_defaults"] == APPLIED
    sampling = server.bart.requests[-1].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.no_repeat_ngram_size) == (141, 55, 3)
    assert sampling.beam == BeamSettings(width=4, length_penalty=2.0, early_stopping=True)


def test_what_a_request_sets_is_not_filled(server: Server) -> None:
    fields = {"max_length": 20, "min_length": 0, "num_beams": 1, "no_repeat_ngram_size": 0, "debug": True}
    body = server.post(SUMMARIZATIONS, model="bart", input="a", **fields).json
    sampling = server.bart.requests[-1].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.beam) == (19, 0, None)
    assert body["applied_defaults"] == {"do_sample": False} and sampling.no_repeat_ngram_size == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_completions_and_chat_follow_the_checkpoint_too(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, model="bart", debug=True, **body)
    assert answer.json["applied_defaults"] == APPLIED
    assert server.bart.requests[-1].sampling.max_tokens == 141
    server.post(path, model="bart", temperature=0.7, max_tokens=90, **body)
    sampling = server.bart.requests[-1].sampling
    assert (sampling.temperature, sampling.beam, sampling.max_tokens, sampling.min_tokens) == (0.7, None, 90, 55)


def bad(code: str, param: str) -> tuple[int, str, str]:
    return 400, code, param


@pytest.mark.parametrize(
    ("path", "fields", "error"),
    [
        (TRANSLATIONS, {"model": "tiny"}, bad("not_encoder_decoder", "model")),
        (SUMMARIZATIONS, {"model": "tiny"}, bad("not_encoder_decoder", "model")),
        (TRANSLATIONS, {"target_language": None}, bad("missing_language", "target_language")),
        (TRANSLATIONS, {"target_language": "tlh"}, bad("unknown_language", "target_language")),
        (TRANSLATIONS, {"source_language": "tlh"}, bad("unknown_language", "source_language")),
        (TRANSLATIONS, {"input": None}, bad("missing_input", "input")),
        (TRANSLATIONS, {"input": []}, bad("invalid_input", "input")),
        (TRANSLATIONS, {"input": ["a"] * 65}, bad("invalid_input", "input")),
        (TRANSLATIONS, {"input": 5}, bad("invalid_input", "input")),
        (TRANSLATIONS, {"input": ["a", ""]}, bad("invalid_input", "input[1]")),
        (TRANSLATIONS, {"input": [1, 2]}, bad("invalid_input", "input[0]")),
        (TRANSLATIONS, {"input": ["a", "b" * (MAX_ENCODER_LEN + 1)]}, bad("context_length_exceeded", "input[1]")),
        (TRANSLATIONS, {"stream": True}, bad("unsupported_parameter", "stream")),
        (SUMMARIZATIONS, {"min_length": 30, "max_length": 20}, bad("invalid_value", "min_length")),
        (SUMMARIZATIONS, {"min_length": 30, "max_tokens": 20}, bad("invalid_value", "min_length")),
        (SUMMARIZATIONS, {"min_length": -1}, bad("invalid_value", "min_length")),
        (SUMMARIZATIONS, {"max_length": 1}, bad("invalid_value", "max_length")),
        (SUMMARIZATIONS, {"max_length": 10, "max_tokens": 9}, bad("conflicting_parameters", "max_length")),
        (SUMMARIZATIONS, {"max_length": 10**6}, bad("context_length_exceeded", "max_length")),
        (SUMMARIZATIONS, {"max_length": "x"}, bad("invalid_type", "max_length")),
        (SUMMARIZATIONS, {"model": "bart", "min_length": 500}, bad("invalid_value", "min_length")),
        (SUMMARIZATIONS, {"num_beams": 0}, bad("invalid_value", "num_beams")),
        (SUMMARIZATIONS, {"num_beams": 4, "temperature": 1.0}, bad("invalid_value", "temperature")),
        (SUMMARIZATIONS, {"length_penalty": 2.0}, bad("invalid_value", "length_penalty")),
        (SUMMARIZATIONS, {"num_beams": 2, "early_stopping": "soon"}, bad("invalid_value", "early_stopping")),
        (SUMMARIZATIONS, {"num_beams": 2, "n": 3}, bad("invalid_value", "n")),
    ],
)
def test_bad_input_is_refused_by_name(
    server: Server, path: str, fields: dict[str, Any], error: tuple[int, str, str]
) -> None:
    defaults = {"model": "many", "input": "a", "target_language": "fr"}
    if fields.get("model") == "tiny":
        del defaults["target_language"]
    assert server.post(path, **defaults | fields).error == error


def test_a_decoder_prompt_behind_the_checkpoints_limit_is_refused(server: Server) -> None:
    answer = server.post("/v1/completions", model="bart", prompt="a", decoder_prompt="b" * 200)
    assert answer.error == bad("context_length_exceeded", "decoder_prompt")
    assert (
        server.post("/v1/completions", model="bart", prompt="a", decoder_prompt="b" * 200, max_tokens=5).status == 200
    )
