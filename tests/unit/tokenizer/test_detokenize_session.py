"""Handles of a Detokenize stream: opened, pushed, stopped, closed; anything else ends the stream."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trivium import columns
from trivium.errors import InvalidRequestError
from trivium.tokenizer import detokenize_session
from trivium.tokenizer.detokenize_session import DetokenizeSession
from trivium.v1 import tokenizer_pb2
from unit.tokenizer.tiny_tokenizers import EOS, make_tokenizer

Row = tuple[int, Sequence[int], bool]


def make_session() -> DetokenizeSession:
    return DetokenizeSession(make_tokenizer())


def ids_of(text: str) -> list[int]:
    return make_tokenizer().encode([text])[0]


def opened(handle: int, *, stop: Sequence[str] = (), **options: object) -> tokenizer_pb2.DetokenizeOpen:
    return tokenizer_pb2.DetokenizeOpen(handle=handle, skip_special_tokens=True, stop=stop, **options)  # type: ignore[arg-type]


def make_push(
    *rows: Row, opens: Sequence[tokenizer_pb2.DetokenizeOpen] = (), closed: Sequence[int] = (), sequence: int = 1
) -> tokenizer_pb2.DetokenizePush:
    counts, ids = columns.pack_ragged([row[1] for row in rows])
    return tokenizer_pb2.DetokenizePush(
        sequence=sequence,
        opens=opens,
        handles=columns.pack(row[0] for row in rows),
        counts=counts,
        ids=ids,
        final=columns.pack((row[2] for row in rows), "B"),
        closed_handles=columns.pack(closed),
    )


def texts(session: DetokenizeSession, push: tokenizer_pb2.DetokenizePush) -> list[str]:
    answer = session.apply(push)
    session.check_invariants()
    assert answer.sequence == push.sequence
    return list(answer.texts)


def code_of(session: DetokenizeSession, push: tokenizer_pb2.DetokenizePush) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        session.apply(push)
    return raised.value.code


def test_each_row_gets_the_text_of_its_own_stream() -> None:
    session = make_session()
    push = make_push((7, ids_of("one"), False), (9, ids_of("two"), False), opens=[opened(7), opened(9)])
    assert texts(session, push) == ["one", "two"]
    assert texts(session, make_push((9, ids_of(" three"), True), (7, [], True))) == [" three", ""]


def test_special_tokens_are_as_the_handle_was_opened() -> None:
    verbatim = tokenizer_pb2.DetokenizeOpen(handle=2, skip_special_tokens=False)
    rows = [(handle, ids_of(f"one{EOS}"), True) for handle in (1, 2)]
    assert texts(make_session(), make_push(*rows, opens=[opened(1), verbatim])) == ["one", f"one{EOS}"]


def test_a_stop_hit_names_row_string_and_tokens() -> None:
    session = make_session()
    ids = ids_of("one STOP two")
    push = make_push((1, [], False), (2, ids, False), opens=[opened(1), opened(2, stop=["zzz", "STOP"])])
    answer = session.apply(push)
    assert list(answer.texts) == ["", "one "]
    (hit,) = answer.stops
    assert (hit.row, hit.stop_index) == (1, 1)
    assert make_tokenizer().decode(ids[: hit.tokens_kept]).rstrip().endswith("STOP")


def test_the_stop_string_is_part_of_the_text_on_demand() -> None:
    push = make_push(
        (1, ids_of("one STOP two"), True), opens=[opened(1, stop=["STOP"], include_stop_str_in_output=True)]
    )
    assert texts(make_session(), push) == ["one STOP"]


def test_rows_in_flight_after_a_stop_are_ignored_until_the_handle_is_closed() -> None:
    session = make_session()
    session.apply(make_push((1, ids_of("STOP"), False), opens=[opened(1, stop=["STOP"])]))
    assert texts(session, make_push((1, ids_of("two"), False))) == [""]
    assert texts(session, make_push((1, ids_of("two"), True))) == [""]
    assert code_of(session, make_push((1, ids_of("two"), False))) == "unknown_handle"


def test_a_stopped_handle_can_be_closed_or_opened_again() -> None:
    session = make_session()
    session.apply(make_push((1, ids_of("STOP"), False), opens=[opened(1, stop=["STOP"])]))
    assert texts(session, make_push((1, ids_of("two"), False), opens=[opened(1)])) == ["two"]
    session.apply(make_push((1, [], True), (2, ids_of("STOP"), False), opens=[opened(2, stop=["STOP"])]))
    session.apply(make_push(closed=[2]))
    assert code_of(session, make_push((2, [], False))) == "unknown_handle"


def test_the_memory_for_stopped_handles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenize_session, "MAX_STOPPED_HANDLES", 2)
    session = make_session()
    for handle in range(4):
        session.apply(make_push((handle, ids_of("STOP"), False), opens=[opened(handle, stop=["STOP"])]))
    session.check_invariants()
    assert texts(session, make_push((3, [], False), (2, [], False))) == ["", ""]


def test_replayed_output_is_not_sent_again() -> None:
    ids = ids_of("one two three")
    replayed = opened(1, replay_ids=columns.pack(ids[:-1]), emitted_chars=len("one"))
    expected = "one two three"[len("one") :]
    assert texts(make_session(), make_push((1, ids[-1:], True), opens=[replayed])) == [expected]


def test_tokens_kept_counts_replayed_tokens() -> None:
    ids = ids_of("one STOP")
    answer = make_session().apply(
        make_push((1, ids[2:], True), opens=[opened(1, stop=["STOP"], replay_ids=columns.pack(ids[:2]))])
    )
    assert answer.stops[0].tokens_kept == len(ids)


def test_a_handle_is_closed_by_a_final_row() -> None:
    session = make_session()
    session.apply(make_push((1, ids_of("one"), True), opens=[opened(1)]))
    assert code_of(session, make_push((1, [], False))) == "unknown_handle"


def test_a_handle_is_closed_without_text() -> None:
    session = make_session()
    session.apply(make_push(opens=[opened(1)], closed=[1, 5]))
    session.check_invariants()
    assert code_of(session, make_push((1, [], False))) == "unknown_handle"


def test_an_open_handle_cannot_be_opened() -> None:
    assert code_of(make_session(), make_push(opens=[opened(1), opened(1)])) == "handle_in_use"


@pytest.mark.parametrize("stop", [[""], ["x"] * 17, ["x" * 257]])
def test_stop_strings_are_bounded(stop: list[str]) -> None:
    assert code_of(make_session(), make_push(opens=[opened(1, stop=stop)])) == "invalid_stop"


@pytest.mark.parametrize(
    "field", [{"handles": b"\1\0\0"}, {"counts": columns.pack([2])}, {"final": b""}, {"final": b"\2"}, {"ids": b""}]
)
def test_malformed_columns_are_refused(field: dict[str, bytes]) -> None:
    push = make_push((1, [5], False), opens=[opened(1)])
    for name, value in field.items():
        setattr(push, name, value)
    assert code_of(make_session(), push) == "malformed_columns"


def test_malformed_replay_and_closed_columns_are_refused() -> None:
    assert code_of(make_session(), make_push(opens=[opened(1, replay_ids=b"\1")])) == "malformed_columns"
    push = make_push()
    push.closed_handles = b"\1"
    assert code_of(make_session(), push) == "malformed_columns"
