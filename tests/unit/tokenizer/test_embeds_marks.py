"""Chats with embeddings: where they are among the tokens, whatever the tokenizer does with text beside them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import InvalidRequestError
from trivium.tokenizer.embeds_marks import MARKS
from trivium.tokenizer.tokenizer import Tokenizer
from unit.tokenizer.tiny_tokenizers import Kind, make_backend, make_tokenizer

KINDS: tuple[Kind, ...] = ("byte_level", "metaspace", "byte_fallback", "wordpiece")
EMBEDS = {"type": "prompt_embeds"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_around_embeddings_are_those_of_the_text_around_them(kind: Kind) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.render_chat(chat("one two", [text("the fox"), EMBEDS, text("three")]))
    (place,) = (index for index, token_id in enumerate(ids) if token_id < 0)
    assert ids[place] == -1
    assert shown(tokenizer, ids[:place]) == "<s>user:onetwo</s><s>user:thefox"
    assert shown(tokenizer, ids[place + 1 :]) == "three</s><s>assistant:"
    before = tokenizer.encode(["<s>user: one two</s><s>user: the fox\n"], add_special_tokens=False)[0]
    assert ids[:place] == before


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids, skip_special_tokens=False).split())


def test_each_part_is_found_by_its_number() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.render_chat(chat([EMBEDS, EMBEDS], "x", [text("a"), EMBEDS]), add_generation_prompt=False)
    assert [token_id for token_id in ids if token_id < 0] == [-1, -2, -3]


def test_a_template_that_turns_messages_round_keeps_their_numbers() -> None:
    template = "{% for message in messages | reverse %}{{ message.content }};{% endfor %}"
    tokenizer = Tokenizer(make_backend(template=template))
    ids = tokenizer.render_chat(chat([EMBEDS], [EMBEDS, text("a")]))
    assert [token_id for token_id in ids if token_id < 0] == [-2, -1]


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content }}{{ message.content }}{% endfor %}",
        "nothing of it",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_drops_or_repeats_embeddings_is_refused(template: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Tokenizer(make_backend(template=template)).render_chat(chat([EMBEDS]))
    assert caught.value.code == "template_error"


@pytest.mark.parametrize("content", [MARKS[0], [text("a" + MARKS[3])]])
def test_text_that_spells_a_mark_is_refused_beside_embeddings(content: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] spells"):
        make_tokenizer().render_chat(chat(content, [EMBEDS]))


def test_chats_without_embeddings_know_no_marks() -> None:
    tokenizer = make_tokenizer()
    tokenizer.render_chat(chat([EMBEDS]))
    assert tokenizer.vocab_size == len(make_backend())
    ids = tokenizer.render_chat(chat(MARKS[0]))
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size


@given(st.lists(st.text(max_size=12) | st.none(), min_size=1, max_size=6))
def test_every_part_comes_once_and_in_order_whatever_stands_beside_it(contents: list[str | None]) -> None:
    parts = [EMBEDS if content is None else text(content) for content in contents]
    try:
        ids = make_tokenizer("byte_fallback").render_chat(chat(parts))
    except InvalidRequestError as error:
        assert error.code == "invalid_unicode"
        return
    count = sum(content is None for content in contents)
    assert [token_id for token_id in ids if token_id < 0] == [-1 - number for number in range(count)]
