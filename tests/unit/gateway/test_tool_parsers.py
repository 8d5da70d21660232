"""Tool calls are read out of a text the same way however it is cut, and nothing of them shows in the content."""

from __future__ import annotations

import gc
import json
import keyword
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium_gateway.tool_calls import CallReader, ToolReading
from trivium_gateway.tool_parsers.enforced import NamedCallParser, RequiredCallsParser
from trivium_gateway.tool_parsers.events import CallArguments, CallStart, Content, ToolParser
from trivium_gateway.tool_parsers.hermes import HermesParser
from trivium_gateway.tool_parsers.llama3_json import Llama3JsonParser
from trivium_gateway.tool_parsers.mistral import MistralParser
from trivium_gateway.tool_parsers.pythonic import PythonicParser

Call = tuple[str, str]
PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "required": RequiredCallsParser,
    "named": lambda: NamedCallParser("f"),
}


def read(parser: ToolParser, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    """(content, calls) of a text that comes in `pieces`."""
    content, calls = "", list[list[str]]()
    events = [event for piece in pieces for event in parser.feed(piece)]
    for event in [*events, *parser.finish()]:
        match event:
            case Content(text):
                assert text
                content += text
            case CallStart(name):
                calls.append([name, ""])
            case CallArguments(text):
                assert text
                calls[-1][1] += text
    return content, [(name, arguments) for name, arguments in calls]


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
TRICKY = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "\\",
    '"',
    "{",
    "}",
    "[",
    "]",
    "'",
    "é",
    "\n",
    ";",
    ",",
]
STRINGS = (
    st.lists(st.sampled_from(TRICKY) | st.text(max_size=3), max_size=4)
    .map("".join)
    .filter(lambda text: text.isprintable() or "\n" in text)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<[{"), max_size=20)
PLACES = st.lists(st.integers(0, 10**6), max_size=12)
INDENT = st.sampled_from([None, 2])


def arguments_of(calls: Sequence[Call]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@given(WORDS, CALLS, PLACES, INDENT, st.sampled_from(["arguments", "parameters"]), st.booleans())
def test_hermes(before: str, calls: Any, places: list[int], indent: int | None, key: str, is_first: bool) -> None:
    objects = [
        {"name": name, key: arguments} if is_first else {key: arguments, "name": name} for name, arguments in calls
    ]
    written = "\n".join(f"<tool_call>\n{json.dumps(item, indent=indent)}\n</tool_call>" for item in objects)
    content, found = read(HermesParser(), cut(before + written, places))
    assert arguments_of(found) == calls
    assert content == (before if before.strip() else "")


@given(CALLS, PLACES, st.sampled_from(["", " ", "<|python_tag|>"]))
def test_llama3_json(calls: Any, places: list[int], tag: str) -> None:
    written = "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    content, found = read(Llama3JsonParser(), cut(tag + written, places))
    assert (content, arguments_of(found)) == ("", calls)


@given(WORDS, CALLS, PLACES, st.booleans())
def test_mistral(before: str, calls: Any, places: list[int], is_array: bool) -> None:
    if is_array:
        written = "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    else:
        written = "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)
    content, found = read(MistralParser(), cut(before + written, places))
    assert arguments_of(found) == calls
    assert content == (before if before.strip() else "")


@given(CALLS, PLACES)
def test_pythonic(calls: Any, places: list[int]) -> None:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    ]
    content, found = read(PythonicParser(), cut(f"[{', '.join(written)}]", places))
    assert (content, arguments_of(found)) == ("", calls)


@given(CALLS, PLACES, INDENT)
def test_required(calls: Any, places: list[int], indent: int | None) -> None:
    written = json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls], indent=indent)
    assert arguments_of(read(RequiredCallsParser(), cut(written, places))[1]) == calls


@given(st.dictionaries(NAMES, VALUES), PLACES)
def test_named(arguments: Any, places: list[int]) -> None:
    written = json.dumps(arguments)
    assert read(NamedCallParser("f"), cut(written, places)) == ("", [("f", written)])


PIECES = st.sampled_from(
    [
        *[
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<|python_tag|>",
            "<|py",
        ],
        *[
            '{"name": "f", "arguments": {"a": 1}}',
            '{"name": "f"',
            '"arguments": {',
            '"parameters": "x"',
            '"name": ',
            "}",
            "{",
            "]",
            "[",
        ],
        *["[f(a=1)", "f(", "a='b'", ")", ",", ";", " ", "\n", '"', "'", "\\", "f", "1", "true", ":", "x y", "\ud7ff"],
    ]
)


@pytest.mark.parametrize("name", PARSERS)
@given(text=st.lists(PIECES, max_size=14).map("".join), places=PLACES)
def test_whatever_comes_is_read_the_same_way_in_any_pieces(name: str, text: str, places: list[int]) -> None:
    whole = read(PARSERS[name](), [text])
    assert read(PARSERS[name](), cut(text, places)) == whole
    assert read(PARSERS[name](), list(text)) == whole
    json.dumps(whole).encode()


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "pythonic"])
@given(text=st.text(st.characters(exclude_characters="<[{", codec="utf-8"), max_size=40), places=PLACES)
def test_an_answer_without_calls_is_all_content(name: str, text: str, places: list[int]) -> None:
    assert read(PARSERS[name](), cut(text, places)) == (text, [])


CASES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", 'Sure.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n', "Sure.\n", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call> ok', "ok", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),  # cut by max_tokens
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", "<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "a <tool", "a <tool", []),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}}<tool_call>{"name": "g"}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("hermes", "  \n", "  \n", []),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", '{"answer": 1}', '{"answer": 1}', []),
    ("llama3_json", 'It is {"name": "f", "parameters": {}}', 'It is {"name": "f", "parameters": {}}', []),
    (
        "llama3_json",
        '{"type": "function", "name": "f", "parameters": {"a": [1, {"b": 2}]}}',
        "",
        [("f", '{"a": [1, {"b": 2}]}')],
    ),
    ("llama3_json", '{"name": "f", "parameters": {}} done', "done", [("f", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]</s>', "</s>", [("f", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[CALL_ID]x9[ARGS]{}', "", [("f", '{"a": 1}'), ("g", "{}")]),
    ("mistral", "[TOOL_CALLS]no call", "[TOOL_CALLS]no call", []),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS][]", []),
    (
        "pythonic",
        "[f(a=1, b=-2.5, c=[None, True], d={'k': (1,)}), g.h()]",
        "",
        [("f", '{"a": 1, "b": -2.5, "c": [null, true], "d": {"k": [1]}}'), ("g.h", "{}")],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
    ("pythonic", "[f(a=1), f(b=", "", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a='\\ud800')]", "[f(a='\\ud800')]", []),
    ("required", '[{"name": "f", "parameters": {"a": ', "", [("f", '{"a": ')]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_what_becomes_of(name: str, text: str, content: str, calls: list[Call]) -> None:
    assert read(PARSERS[name](), [text]) == (content, calls)
    assert read(PARSERS[name](), list(text)) == (content, calls)


def test_arguments_come_while_they_are_written() -> None:
    parser = HermesParser()
    assert parser.feed('<tool_call>{"name": "f", "arguments": {"a"') == [CallStart("f"), CallArguments('{"a"')]
    assert parser.feed(": 1") == [CallArguments(": 1")]
    assert parser.feed("}}") == [CallArguments("}")]
    assert parser.feed("</tool_call>") == [] == parser.finish()


def test_deep_nesting_breaks_nothing() -> None:
    deep = "[" * 19000
    assert read(PythonicParser(), [f"[f(a={deep}{']' * 900})]"])[1] == []
    assert read(PythonicParser(), ["[f(a=" + "-" * 19000 + "1)]"])[1] == []
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + deep
    assert read(HermesParser(), [text])[1][0][0] == "f"


HOSTILE: list[tuple[str, Callable[[int], str]]] = [
    ("hermes", lambda size: " " * size),
    ("hermes", lambda size: "<tool_call>" * (size // 11)),
    ("hermes", lambda size: "<tool_call>" + " " * size),
    ("hermes", lambda size: '<tool_call>{"arguments": {"x": "' + "y" * size + '"}, "name": "f"}'),
    ("hermes", lambda size: '<tool_call>{"name": "f", "arguments": {"x": "' + "y" * size),
    ("llama3_json", lambda size: " " * size),
    ("llama3_json", lambda size: '{"name": "f", "parameters": {}}' + " " * size),
    ("mistral", lambda size: "[TOOL_CALLS]" + " " * size),
    ("mistral", lambda size: "[TOOL_CALLS][" + " " * size),
    ("pythonic", lambda size: " " * size),
    ("pythonic", lambda size: "[f(a=1)" + " " * size),
    ("required", lambda size: "[" + " " * size),
]


@pytest.mark.parametrize("length", [4, None])
@pytest.mark.parametrize(("name", "text_of"), HOSTILE)
def test_time_is_linear_in_what_the_model_writes(name: str, text_of: Callable[[int], str], length: int | None) -> None:
    """In deltas of `length` characters, or as one text. CPU time of this thread, the least of three tries."""

    def read_all(text: str) -> float:
        began_s = time.thread_time()
        reader = CallReader(ToolReading(PARSERS[name]))
        for start in range(0, len(text), length or len(text)):
            reader.read(text[start : start + (length or len(text))], is_last=False)
        reader.read("", is_last=True)
        return time.thread_time() - began_s

    def seconds(size: int) -> float:
        text = text_of(size)
        gc.disable()  # a collection looks at all that other tests have left, which may take longer than the reading
        try:
            return min(read_all(text) for _ in range(3))
        finally:
            gc.enable()

    assert seconds(160_000) < 20 * (seconds(20_000) + 0.01)  # 8 times as long, and quadratic would be 64 times
