"""Chats become prompts by the model's template, within limits, and a refusal is the client's error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trivium.errors import InvalidRequestError
from trivium.tokenizer import chat_template
from trivium.tokenizer.chat_template import parse_messages, parse_tools, render
from unit.tokenizer.tiny_tokenizers import make_backend, make_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
PREFILL = [*HELLO, {"role": "assistant", "content": "one two "}]


def rendered(messages: Any, **options: Any) -> str:
    return render(make_tokenizer()._backend, messages, **options)


def code_of(messages: Any, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        rendered(messages, **options)
    return raised.value.code


def test_the_prompt_ends_with_the_beginning_of_an_answer() -> None:
    assert rendered(HELLO) == "<s>user: hello</s><s>assistant: "
    assert rendered(HELLO, add_generation_prompt=False) == "<s>user: hello</s>"


def test_the_final_message_can_be_continued() -> None:
    text = rendered(PREFILL, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s>user: hello</s><s>assistant: one two "


def test_continuing_and_a_generation_prompt_exclude_each_other() -> None:
    assert code_of(PREFILL, continue_final_message=True) == "invalid_value"


def test_ids_are_those_of_transformers() -> None:
    tokenizer = make_tokenizer()
    expected = tokenizer._backend.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert tokenizer.render_chat(HELLO) == expected


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    assert json.dumps([tool]) in rendered(HELLO, tools=[tool])
    assert rendered(HELLO, tools=[]) == rendered(HELLO)


def test_arguments_of_a_tool_call_reach_the_template_as_an_object() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lyon"}'}}
    assert "Lyon" in rendered([{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user: a\nb</s>" in rendered([{"role": "user", "content": parts}])


def test_parts_that_are_no_text_are_refused() -> None:
    assert code_of([{"role": "user", "content": [{"type": "image_url"}]}]) == "unsupported_content"


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        render(make_backend(template=None), HELLO)
    assert raised.value.code == "no_chat_template"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content.missing() }}", "{{ ''.__class__.__mro__ }}", "{% for %}", "{{ range(10 ** 9) | list }}"],
)
def test_a_failing_template_is_one_fixed_error(template: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        render(make_backend(template=template), HELLO)
    assert raised.value.code == "template_error"


def test_what_a_template_says_is_not_shown() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        rendered([{"role": "alien", "content": "secret"}])
    assert raised.value.code == "template_error"
    assert "secret" not in raised.value.message


def test_a_prompt_out_of_proportion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 20)
    assert code_of(HELLO) == "prompt_too_long"


@pytest.mark.parametrize("messages", [[], "x", {"role": "user"}, ["x"], [{"content": "x"}], [{"role": 1}], None])
def test_messages_of_the_wrong_shape_are_refused(messages: Any) -> None:
    assert code_of(messages) == "invalid_messages"


@pytest.mark.parametrize("tools", ["x", {"name": "x"}, ["x"]])
def test_tools_of_the_wrong_shape_are_refused(tools: Any) -> None:
    assert code_of(HELLO, tools=tools) == "invalid_tools"


def test_json_is_read() -> None:
    assert parse_messages(json.dumps(HELLO).encode()) == HELLO
    assert parse_tools(b"") is None
    assert parse_tools(b"[]") == []


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'[{"role": "\\ud800"}]', b"\xff", b'"x"'])
def test_json_that_is_no_chat_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_messages(data)
    assert raised.value.code == "invalid_messages"


def test_json_out_of_proportion_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_messages(b" " * (chat_template.MAX_CHAT_BYTES + 1))
    assert raised.value.code == "prompt_too_long"
