"""The bytes of single tokens: joined they are the text, wherever a character is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from trivium.outputs import TokenText
from trivium.tokenizer.tokenizer import Tokenizer
from unit.tokenizer.tiny_tokenizers import EOS, TOOL, Kind, make_tokenizer, save_family

TEXTS = ["the quick brown fox, ça va très bien", " two  spaces\n", "日本語 😀 👩‍👩‍👧", "<0xE4> \u2581 Ġ"]
KNOWN = "the quick brown fox, ça va très bien"


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(token.raw for token in tokenizer.token_texts(ids) if not token.is_special)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_tokens_join_to_the_text(text: str) -> None:
    tokenizer = make_tokenizer("byte_level")
    (ids,) = tokenizer.encode([text])
    assert joined(tokenizer, ids) == text.encode()
    assert len(ids) > 1


@pytest.mark.parametrize("text", TEXTS[:3])
def test_bytes_of_byte_fallback_pieces_join_to_the_text_behind_its_first_space(text: str) -> None:
    tokenizer = make_tokenizer("byte_fallback")
    (ids,) = tokenizer.encode([text])
    assert joined(tokenizer, ids) == b" " + text.encode()


def test_bytes_of_metaspace_pieces_join_to_the_text_behind_its_first_space() -> None:
    tokenizer = make_tokenizer("metaspace")
    (ids,) = tokenizer.encode([KNOWN])
    assert joined(tokenizer, ids) == b" " + KNOWN.encode()


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5", "byt5"])
def test_every_family(family: Literal["marian", "m2m_100", "t5", "byt5"], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_family(tmp_path, family))
    (ids,) = tokenizer.encode([KNOWN])
    text = joined(tokenizer, ids).decode()
    if family == "byt5":
        assert text == KNOWN and len(ids) == len(KNOWN.encode()) + 1
    else:
        assert text.removeprefix("__en__").replace("⁇", "") == " " + KNOWN


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_cut_character_shows_as_replacement_with_its_own_bytes(kind: Kind) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode(["\U0001f9ff"])
    tokens = tokenizer.token_texts(ids[-4:])
    assert b"".join(token.raw for token in tokens) == "\U0001f9ff".encode()
    assert {token.text for token in tokens} == {"\ufffd"} and len(tokens) > 2


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback", "wordpiece"])
def test_special_added_and_unknown_tokens(kind: Kind) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode([f"{EOS}{TOOL}"], add_special_tokens=False)
    by_text = {token.text: token for token in tokenizer.token_texts(ids)}
    assert by_text[EOS] == TokenText(EOS, EOS.encode(), is_special=True)
    assert by_text[TOOL] == TokenText(TOOL, TOOL.encode(), is_special=False)
    assert tokenizer.token_texts([tokenizer.vocab_size + 5]) == [TokenText("", b"")]


def test_wordpieces_are_what_they_decode_to() -> None:
    tokenizer = make_tokenizer("wordpiece")
    (ids,) = tokenizer.encode(["quick"])
    assert [token.text for token in tokenizer.token_texts(ids)] == [tokenizer.decode([token_id]) for token_id in ids]
