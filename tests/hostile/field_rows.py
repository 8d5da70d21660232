"""B36 to B53, B61 and B75: sampling, log-probabilities, stops, grammars, streams, beams."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from hostile.row import MISSING, VOCAB_SIZE, Row, Taken, bad, cases, chat, completion, values
from time_limits import GRAMMAR_S

FINITE = Taken(lambda answer: all(map(math.isfinite, answer["choices"][0]["logprobs"]["token_logprobs"])))
WORDS = {f"w{index}": {"type": "integer"} for index in range(10_000)}


def logprob_values(answer: Any) -> list[float]:
    """All numbers below `logprobs` of a completion."""
    (choice,) = answer["choices"]
    return [value for top in choice["logprobs"]["top_logprobs"] for value in top.values()]


def grammar(number: str, *rows: tuple[str, dict[str, Any], Any]) -> list[Row]:
    """Rows of completions that may take as long as a compiler of grammars may."""
    return [Row(f"{number} {name}", completion(**fields), answer, max_s=GRAMMAR_S) for name, fields, answer in rows]


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}}


def refused_schema(code: str = "invalid_grammar") -> Any:
    return bad(code, "response_format.json_schema.schema")


def refused_field(name: str, code: str = "invalid_grammar") -> Any:
    return bad(code, name)


def deep(keyword: str, levels: int) -> Any:
    return reduce(lambda inner, _: {keyword: [inner, {"type": "null"}]}, range(levels), {"type": "integer"})


ROWS: list[Row] = [
    *values("B36", "max_tokens", (-1, 0, 2**31), "invalid_value"),
    *values("B36", "max_tokens", (1.5, "5", True), "invalid_type"),
    *values("B36", "max_tokens", (10**9,), "context_length_exceeded"),
    *cases(
        "B36",
        ("null", completion(max_tokens=None), Taken()),
        ("null of a chat", chat(max_tokens=None, stop_token_ids=list(range(VOCAB_SIZE))), Taken()),
    ),
    *values("B36", "max_completion_tokens", (0, -1), "invalid_value", on=(chat,), max_tokens=MISSING),
    *values("B37", "n", (0, -1, 17, 10**9), "invalid_value"),
    *values("B37", "best_of", (2, 17), "invalid_value", n=3),
    *values("B37", "best_of", (2,), "invalid_value", stream=True),
    *values("B38", "temperature", (-0.1, 2.1, 1e308), "invalid_value"),
    *values("B38", "temperature", ("hot", "NaN", True, [1]), "invalid_type"),
    *cases("B38", ("null", completion(temperature=None), Taken()), ("1e-9", completion(temperature=1e-9), Taken())),
    *values("B39", "top_p", (0, 1.1, -1), "invalid_value"),
    *values("B39", "top_k", (-2, 10**12), "invalid_value"),
    *values("B39", "top_k", (0.5,), "invalid_type"),
    *values("B39", "min_p", (2, -0.1), "invalid_value"),
    *values("B39", "presence_penalty", (3, -2.1), "invalid_value"),
    *values("B39", "frequency_penalty", (3, -2.1), "invalid_value"),
    *values("B39", "repetition_penalty", (0, -1), "invalid_value"),
    *values("B40", "seed", (2**63, -(2**63) - 1), "invalid_value"),
    *values("B40", "seed", (1.2, "x"), "invalid_type"),
    *cases("B40", *((str(seed), completion(seed=seed), Taken()) for seed in (2**63 - 1, -(2**63), 0))),
    *values("B41", "logprobs", (21, -1), "invalid_value", on=(completion,)),
    *values("B41", "logprobs", (True, "x", 0.5), "invalid_type", on=(completion,)),
    *values("B41", "logprobs", (21, "x"), "invalid_type", on=(chat,)),
    *values("B41", "top_logprobs", (2,), "invalid_value", on=(chat,)),
    *values("B41", "top_logprobs", (-1, 21), "invalid_value", on=(chat,), logprobs=True),
    *values("B41", "prompt_logprobs", (-1, 21), "invalid_value"),
    *values("B41", "prompt_logprobs", (1,), "invalid_value", stream=True),
    *cases(
        "B42",
        ("one token allowed", completion(allowed_token_ids=[9], logprobs=20),
         Taken(lambda answer: all(-1e4 < value <= 0 for value in logprob_values(answer)))),
        ("tokens banned", completion(logit_bias={"9": -100, "10": 100}, logprobs=5, temperature=0), FINITE),
        ("a grammar", completion(guided_regex="ab", logprobs=5), FINITE),
    ),
    *values(
        "B43", "logit_bias",
        ({"abc": 1}, {"-1": 1}, {str(VOCAB_SIZE): 1}, {"9" * 30: 1}, {"5": 101}, {"5": "1"}, {"5": None}, [5], "5",
         {str(token_id): 1 for token_id in range(2000)}),
        "invalid_logit_bias",
    ),
    *values("B44", "stop", (["x"] * 17, "", [""], "x" * 300, 5, [["x"]], [5]), "invalid_stop"),
    *cases(
        "B45",
        ("stop id", completion(stop_token_ids=[VOCAB_SIZE]), bad("invalid_token_id", "stop_token_ids[0]")),
        ("allowed id", completion(allowed_token_ids=[5, VOCAB_SIZE]), bad("invalid_token_id", "allowed_token_ids[1]")),
    ),
    *values("B45", "stop_token_ids", ([-1], [5] * 1025), "invalid_value"),
    *values("B45", "allowed_token_ids", ([], [-1]), "invalid_value"),
    *values("B45", "bad_words", ([""], [" "], ["x" * 300], ["x"] * 300), "invalid_value"),
    *values("B46", "min_tokens", (6, -1, 5000), "invalid_value", max_tokens=5),
    *grammar(
        "B47",
        ("no schema", {"response_format": {"type": "json_schema"}},
         bad("invalid_schema", "response_format.json_schema")),
        ("null", schema(None), refused_schema("invalid_schema")),
        ("list", schema([]), refused_schema("invalid_schema")),
        ("text", schema("{}"), refused_schema("invalid_schema")),
        ("{}", schema({}), Taken()),
        ("type of a list", {"response_format": {"type": ["json_object"]}},
         bad("invalid_value", "response_format.type")),
        ("text as format", {"response_format": "json"}, bad("invalid_type", "response_format")),
    ),
    *grammar(
        "B48",
        ("$ref cycle", schema({"$ref": "#"}), refused_schema()),
        ("$ref cycle of two", schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                                      "$ref": "#/$defs/a"}), refused_schema()),
        ("remote $ref", schema({"$ref": "http://169.254.169.254/x"}), refused_schema()),
        ("100-deep oneOf", schema(deep("oneOf", 100)), bad("json_too_deep")),
        ("20-deep oneOf", schema(deep("oneOf", 20)), refused_schema()),
        ("10,000 properties", schema({"properties": WORDS}), refused_schema("too_long")),
        ("backtracking pattern", schema({"type": "string", "pattern": "(a+)+$"}), Taken()),
        ("invalid pattern", schema({"type": "string", "pattern": "a("}), refused_schema()),
        ("unsatisfiable", schema({"type": "integer", "minimum": 5, "maximum": 4}), refused_schema()),
        ("false", {"guided_json": "false"}, refused_field("guided_json")),
        ("unknown type", schema({"type": "frog"}), refused_schema()),
        ("endless", schema({"type": "integer", "multipleOf": 999_983}), refused_schema("grammar_too_complex")),
    ),
    *grammar(
        "B49",
        ("no choice", {"guided_choice": []}, refused_field("guided_choice")),
        ("empty choice", {"guided_choice": [""]}, refused_field("guided_choice")),
        ("choice of numbers", {"guided_choice": [1]}, refused_field("guided_choice")),
        ("left recursion", {"guided_grammar": 'root ::= root "a" | "b"'}, Taken()),
        ("endless recursion", {"guided_grammar": 'root ::= root "a"'}, refused_field("guided_grammar")),
        ("undefined rule", {"guided_grammar": "root ::= nothing"}, refused_field("guided_grammar")),
        ("lookbehind", {"guided_regex": "(?<=a)b"}, refused_field("guided_regex")),
        ("lookahead", {"guided_regex": "(?=a)b"}, refused_field("guided_regex")),
        ("backreference", {"guided_regex": r"(a)\1"}, refused_field("guided_regex")),
        ("invalid regex", {"guided_regex": "a("}, refused_field("guided_regex")),
        ("not text", {"guided_regex": 5}, refused_field("guided_regex")),
        ("empty regex", {"guided_regex": ""}, refused_field("guided_regex")),
    ),
    *grammar(
        "B50",
        ("regex and choice", {"guided_regex": "a", "guided_choice": ["a"]},
         bad("conflicting_parameters", "guided_choice")),
        ("two kinds", {"structured_outputs": {"regex": "a", "choice": ["a"]}},
         bad("conflicting_parameters", "structured_outputs")),
        ("schema and regex", schema({}) | {"guided_regex": "a"}, bad("conflicting_parameters", "guided_regex")),
        ("grammar and ids", {"guided_regex": "a", "allowed_token_ids": [5]},
         bad("conflicting_parameters", "allowed_token_ids")),
        ("grammar and beams", {"guided_regex": "ab", "num_beams": 2}, Taken()),
    ),
    *values("B51", "stream_options", ({"include_usage": True},), "invalid_value"),
    *values("B52", "stream", ("yes", 1), "invalid_type"),
    *values("B53", "echo", (True,), "unsupported_parameter", on=(chat,)),
    *values("B53", "suffix", ("x",), "unsupported_parameter", on=(completion,)),
    *values("B61", "user", ("u" * 10_000,), "too_long"),
    *values("B61", "metadata", ({"k": "v" * 10_000}, {str(key): "" for key in range(1000)}), "too_long"),
    *values("B75", "num_beams", (0, 17, -1), "invalid_value"),
    *values("B75", "num_beams", (1.5, "4"), "invalid_type"),
    *values("B75", "temperature", (0.7,), "invalid_value", num_beams=4),
    *values("B75", "length_penalty", (1e3, -1e3), "invalid_value", num_beams=4),
    *values("B75", "length_penalty", ("NaN",), "invalid_type", num_beams=4),
    *values("B75", "beam_width", (3,), "conflicting_parameters", num_beams=4),
]  # fmt: skip
