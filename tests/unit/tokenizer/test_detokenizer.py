"""The text of a stream: the same however it is cut, whole characters only, ended by stop strings, rebuilt by replay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.tokenizer.detokenizer import MAX_PENDING_TOKENS, REPLACEMENT, IncrementalDetokenizer, StopMatch
from trivium.tokenizer.tokenizer import Tokenizer
from unit.tokenizer.tiny_tokenizers import BOS, CORPUS, EOS, TOOL, Kind, make_tokenizer

KINDS: tuple[Kind, ...] = ("byte_level", "metaspace", "byte_fallback", "wordpiece")
# Decoders that give the text of a sequence as the texts of its parts, even for bytes that are no text.
EXACT_KINDS: tuple[Kind, ...] = ("byte_level", "metaspace", "wordpiece")

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Whole words of the corpus (so that tokens of many characters occur), and single characters of every kind.
texts = st.lists(
    st.one_of(
        st.sampled_from(sorted({word for line in CORPUS for word in line.split(" ")})),
        st.sampled_from([" ", "  ", "\n", "é", "e\u0301", "😀", "👩‍👩‍👧", "漢", "한", "\u202e", "a", "\u00a0"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=3),
    ),
    max_size=12,
).map("".join)
kinds = st.sampled_from(KINDS)


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], *, stop: Sequence[str] = (), include: bool = False, skip: bool = True
) -> tuple[list[str], StopMatch | None]:
    """Text after each single id, and after the end."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, stop=stop, include_stop_str_in_output=include)
    out: list[str] = []
    for token_id in ids:
        text, match = detokenizer.push([token_id])
        out.append(text)
        if match is not None:
            return out, match
    text, match = detokenizer.push([], final=True)
    return [*out, text], match


def at_once(
    tokenizer: Tokenizer, ids: Sequence[int], *, stop: Sequence[str] = (), include: bool = False
) -> tuple[str, StopMatch | None]:
    detokenizer = tokenizer.detokenizer(stop=stop, include_stop_str_in_output=include)
    return detokenizer.push(ids, final=True)


@few
@given(kinds, texts)
def test_streamed_text_is_the_decoded_text(kind: Kind, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode([text])
    streamed, _ = stream(tokenizer, ids)
    assert "".join(streamed) == tokenizer.decode(ids)
    assert at_once(tokenizer, ids) == (tokenizer.decode(ids), None)


@few
@given(st.sampled_from(["byte_level", "byte_fallback"]), texts)
def test_no_part_of_a_character_is_delivered(kind: Kind, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode([text])
    streamed, _ = stream(tokenizer, ids)
    assert "".join(streamed) == text
    assert not any(REPLACEMENT in part for part in streamed)


@few
@given(kinds, st.data(), st.booleans())
def test_text_does_not_depend_on_how_the_ids_are_cut_into_pushes(kind: Kind, data: st.DataObject, skip: bool) -> None:
    tokenizer = make_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=80))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    expected, _ = stream(tokenizer, ids, skip=skip)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    parts = [detokenizer.push(ids[start:end])[0] for start, end in zip([0, *cuts], cuts, strict=False)]
    parts.append(detokenizer.push(ids[cuts[-1] if cuts else 0 :], final=True)[0])
    assert "".join(parts) == "".join(expected)


@few
@given(st.sampled_from(EXACT_KINDS), st.data(), st.booleans())
def test_any_ids_stream_to_what_transformers_decodes(kind: Kind, data: st.DataObject, skip: bool) -> None:
    tokenizer = make_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=80))
    streamed, _ = stream(tokenizer, ids, skip=skip)
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(streamed) == expected


@few
@given(kinds, texts.filter(bool), st.data(), st.booleans())
def test_text_ends_at_the_stop_string_wherever_it_begins_and_ends(
    kind: Kind, text: str, data: st.DataObject, include: bool
) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode([text])
    full = tokenizer.decode(ids)
    start = data.draw(st.integers(0, max(0, len(full) - 1)))
    stop = full[start : start + data.draw(st.integers(1, 6))] or "x"
    streamed, match = stream(tokenizer, ids, stop=[stop], include=include)
    position = full.find(stop)
    if position < 0:
        assert ("".join(streamed), match) == (full, None)
        return
    assert "".join(streamed) == full[: position + len(stop) * include]
    assert match is not None
    unstopped, _ = stream(tokenizer, ids)
    completed = next(n for n in range(len(unstopped)) if stop in "".join(unstopped[: n + 1]))
    assert match == StopMatch(0, min(completed + 1, len(ids)))
    assert at_once(tokenizer, ids, stop=[stop], include=include) == ("".join(streamed), match)


@few
@given(kinds, texts, st.lists(st.text("ab <st\n", min_size=1, max_size=4), min_size=1, max_size=4))
def test_nothing_of_a_stop_string_leaks_and_nothing_else_is_lost(kind: Kind, text: str, stop: list[str]) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode(["a stab <s t> " + text])
    full = tokenizer.decode(ids)
    streamed, match = stream(tokenizer, ids, stop=stop)
    assert full.startswith("".join(streamed))
    if match is None:
        assert "".join(streamed) == full
        assert not any(item in full for item in stop)
    else:
        delivered = "".join(streamed)
        assert full[len(delivered) :].startswith(stop[match.stop_index])
        assert not any(item in delivered for item in stop)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [(), ("the lazy", "zzz"), ("dog",)])
def test_replay_at_every_split_point_goes_on_with_the_same_text(kind: Kind, stop: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer(kind)
    (ids,) = tokenizer.encode(["naïve 😀 fox jumps over the lazy dog 日本語 the end"])
    whole, match = stream(tokenizer, ids, stop=stop)
    num_tokens = len(ids) if match is None else match.tokens_kept
    for split in range(num_tokens + 1):
        delivered = "".join(whole[:split])
        for missing in (0, 1, len(delivered)):
            emitted_chars = max(0, len(delivered) - missing)
            detokenizer = tokenizer.detokenizer(stop=stop)
            detokenizer.replay(ids[:split], emitted_chars)
            text, replayed_match = detokenizer.push(ids[split:], final=True)
            assert delivered[:emitted_chars] + text == "".join(whole)
            assert replayed_match == match


def test_replay_drops_text_that_was_delivered_beyond_the_replayed_ids() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode(["one two three"])
    detokenizer = tokenizer.detokenizer()
    detokenizer.replay(ids[:1], len("one two"))
    assert detokenizer.push(ids[1:], final=True) == (" three", None)


def test_the_stop_string_that_begins_first_wins() -> None:
    tokenizer = make_tokenizer()
    ids = [tokenizer.encode([word])[0] for word in ("x", "the quick")]
    text, match = tokenizer.detokenizer(stop=["uick", "quick", "qu"]).push(ids[0] + ids[1], final=True)
    assert text == "xthe "
    assert match is not None and match.stop_index in (1, 2)


def test_of_two_stop_strings_in_one_token_the_earlier_one_wins_then_the_first_listed() -> None:
    detokenizer = plain_detokenizer({0: "abcdef"}, stop=["cd", "bcde", "bc"])
    assert detokenizer.push([0]) == ("a", StopMatch(1, 1))


def test_held_text_comes_when_it_cannot_become_a_stop_string() -> None:
    detokenizer = plain_detokenizer({0: "a", 1: "b", 2: "x"}, stop=["aab"])
    assert [detokenizer.push([token_id])[0] for token_id in (0, 0, 0, 2)] == ["", "", "a", "aax"]
    assert detokenizer.push([0], final=True) == ("a", None)


def test_stop_match_counts_tokens_without_text() -> None:
    tokenizer = make_tokenizer()
    special = tokenizer.encode([BOS])[0]
    (ids,) = tokenizer.encode(["ab"])
    _, match = tokenizer.detokenizer(stop=["ab"]).push([*special, *ids, *special])
    assert match == StopMatch(0, 1 + len(ids))


def test_special_tokens_are_skipped_only_on_demand() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode([f"{BOS}one{TOOL} two{EOS}"])
    assert "".join(stream(tokenizer, ids)[0]) == f"one{TOOL} two"
    assert "".join(stream(tokenizer, ids, skip=False)[0]) == f"{BOS}one{TOOL} two{EOS}"


def test_a_word_after_a_skipped_special_token_keeps_its_space() -> None:
    tokenizer = make_tokenizer("metaspace")
    one, two = (tokenizer.encode([word])[0] for word in ("one", "two"))
    (eos,) = tokenizer.encode([EOS])
    assert "".join(stream(tokenizer, [*one, eos[-1], *two])[0]) == "one two"


def test_an_incomplete_character_at_the_end_becomes_one_replacement_character() -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode(["ok 🦀"])
    assert "".join(stream(tokenizer, ids[:-1])[0]) == "ok " + REPLACEMENT


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_replacement_characters_that_are_the_text_itself_come_through(kind: Kind) -> None:
    tokenizer = make_tokenizer(kind)
    text = "a" + REPLACEMENT * 100 + "é"
    (ids,) = tokenizer.encode([text])
    streamed, _ = stream(tokenizer, ids)
    assert "".join(streamed) == text
    assert max(map(len, streamed)) <= MAX_PENDING_TOKENS


@pytest.mark.parametrize("text", ["the quick brown fox 日本 ", "\u0085", REPLACEMENT])
def test_the_cost_of_a_token_does_not_grow_with_the_stream(text: str) -> None:
    tokenizer = make_tokenizer()
    (ids,) = tokenizer.encode([text * 400])
    ids = [token_id for token_id in ids if token_id % 7] if text == "\u0085" else ids
    num_decoded = 0

    def decode(token_ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return tokenizer._decode(token_ids)

    detokenizer = IncrementalDetokenizer(decode, lambda token_id: False)
    for token_id in ids:
        detokenizer.push([token_id])
    assert num_decoded / len(ids) < 4 * MAX_PENDING_TOKENS


def plain_detokenizer(pieces: dict[int, str], stop: Sequence[str]) -> IncrementalDetokenizer:
    """A stream over a tokenizer whose tokens are just texts."""
    return IncrementalDetokenizer(lambda ids: "".join(pieces[i] for i in ids), lambda _: False, stop=stop)
