"""What penalties, bans and filters are refused: status, code and param, on both routes."""

from __future__ import annotations

from typing import Any

import pytest

from unit.gateway.fakes import VOCAB_SIZE, World, post

Error = tuple[int, str, str | None]


def bad(code: str, param: str | None) -> Error:
    return 400, code, param


ROWS: list[tuple[dict[str, Any], Error]] = [
    *(
        ({"logit_bias": value}, bad("invalid_logit_bias", "logit_bias"))
        for value in (
            {"abc": 1},
            {"-1": 1},
            {"1.0": 1},
            {str(VOCAB_SIZE): 1},
            {"9" * 30: 1},
            {"5": 101},
            {"5": "1"},
            {"5": None},
            {"5": True},
            {"5": 1, "05": 2},
            [5],
            "5",
            7,
            {str(token_id): 1 for token_id in range(2000)},
        )
    ),
    *(
        ({name: value}, bad("invalid_value", name))
        for name, value in (
            ("presence_penalty", 2.1),
            ("frequency_penalty", -3),
            ("repetition_penalty", 0),
            ("repetition_penalty", -1),
            ("no_repeat_ngram_size", -1),
            ("no_repeat_ngram_size", 10**6),
            ("encoder_repetition_penalty", 0),
            ("encoder_no_repeat_ngram_size", -1),
            ("encoder_no_repeat_ngram_size", 10**6),
            ("suppress_tokens", [-1]),
            ("suppress_tokens", [1] * 1025),
            ("begin_suppress_tokens", [2**31]),
            ("forced_bos_token_id", -1),
            ("max_new_tokens", 0),
            ("min_new_tokens", -1),
            ("min_new_tokens", 5000),
            ("typical_p", 1.1),
            ("top_a", -0.1),
            ("epsilon_cutoff", -1),
            ("eta_cutoff", 1e5),
            ("dry_multiplier", -1),
            ("dry_base", 1),
            ("dry_allowed_length", 10**6),
            ("dry_range", -1),
            ("xtc_threshold", -0.1),
            ("xtc_probability", 2),
            ("bad_words", [""]),
            ("bad_words", [" "]),
            ("bad_words", ["x" * 300]),
            ("bad_words", ["x"] * 129),
            ("allowed_token_ids", []),
            ("allowed_token_ids", [-1]),
        )
    ),
    *(
        ({name: value}, bad("invalid_type", name))
        for name, value in (
            ("presence_penalty", "x"),
            ("frequency_penalty", [0.1]),
            ("repetition_penalty", True),
            ("no_repeat_ngram_size", 2.5),
            ("encoder_repetition_penalty", "x"),
            ("encoder_no_repeat_ngram_size", 2.5),
            ("suppress_tokens", 5),
            ("suppress_tokens", ["a"]),
            ("begin_suppress_tokens", [True]),
            ("forced_bos_token_id", [5]),
            ("forced_bos_token_id", "5"),
            ("max_new_tokens", "5"),
            ("min_new_tokens", 1.5),
            ("bad_words", "x"),
            ("bad_words", [5]),
            ("allowed_token_ids", ["a"]),
            ("dry_sequence_breaker_ids", 3),
        )
    ),
    ({"allowed_token_ids": [1, VOCAB_SIZE]}, bad("invalid_token_id", "allowed_token_ids[1]")),
    ({"dry_sequence_breaker_ids": [VOCAB_SIZE]}, bad("invalid_token_id", "dry_sequence_breaker_ids[0]")),
    ({"suppress_tokens": [VOCAB_SIZE]}, bad("invalid_token_id", "suppress_tokens[0]")),
    ({"begin_suppress_tokens": [1, VOCAB_SIZE]}, bad("invalid_token_id", "begin_suppress_tokens[1]")),
    ({"encoder_repetition_penalty": 1.2}, bad("not_encoder_decoder", "encoder_repetition_penalty")),
    ({"encoder_no_repeat_ngram_size": 3}, bad("not_encoder_decoder", "encoder_no_repeat_ngram_size")),
    ({"forced_bos_token_id": 5}, bad("not_encoder_decoder", "forced_bos_token_id")),
    ({"max_new_tokens": 10**9}, bad("context_length_exceeded", "max_new_tokens")),
    ({"max_new_tokens": 5, "max_tokens": 6}, bad("conflicting_parameters", "max_new_tokens")),
    ({"min_new_tokens": 5, "min_tokens": 6}, bad("conflicting_parameters", "min_new_tokens")),
    ({"max_new_tokens": 5, "min_new_tokens": 6}, bad("invalid_value", "min_new_tokens")),
]


@pytest.mark.parametrize(("fields", "error"), ROWS, ids=[f"{fields!s:.50}" for fields, _ in ROWS])
def test_bad_value(world: World, fields: dict[str, Any], error: Error) -> None:
    completion = {"model": "tiny", "prompt": "a"}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    assert post(world.port, "/v1/completions", completion | fields).error == error
    assert post(world.port, "/v1/chat/completions", chat | fields).error == error


def test_a_forced_bos_outside_the_vocabulary_is_refused(world: World) -> None:
    fields = {"model": "org/translator", "prompt": "a", "forced_bos_token_id": VOCAB_SIZE}
    assert post(world.port, "/v1/completions", fields).error == bad("invalid_token_id", "forced_bos_token_id")


def test_a_logit_bias_of_another_spelling_is_the_same_token(world: World) -> None:
    fields = {"model": "tiny", "prompt": "a", "logit_bias": {"007": 1}}
    assert post(world.port, "/v1/completions", fields).status == 200
    assert world.tiny.requests[-1].sampling.logit_bias == {7: 1.0}
