"""Which candidates of a beam search complete a stop string: bytes of tokens, wherever it begins and ends."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tiny import save_tiny
from trivium.errors import InvalidRequestError
from trivium.executor.stop_strings import StopStrings, TokenTexts, TokenTextService
from trivium.params import SamplingParams
from trivium.step import BeamCandidates

TOKENS = (b"", b"ab", b"c", b"abcab", "ü".encode()[:1], "ü".encode()[1:], b"</s>", b" ")
EOS, HALF, REST, UNKNOWN = 6, 4, 5, 0
TEXTS = TokenTexts(TOKENS, frozenset({EOS}))


def batch_of(*beams: list[int], prompt: tuple[int, ...] = ()) -> Any:
    """The beams in slots 0, 1, ..., after a prompt."""
    length = len(prompt) + max(map(len, beams))
    rows = np.zeros((len(beams), length), np.int64)
    for slot, beam in enumerate(beams):
        rows[slot, : len(prompt) + len(beam)] = [*prompt, *beam]
    lengths = np.array([len(prompt) + len(beam) for beam in beams])
    return SimpleNamespace(token_ids=rows, num_tokens=lengths, num_prompt_tokens=np.full(len(beams), len(prompt)))


def completed(stop: str | list[str], batch: Any, candidates: list[tuple[int, int]], **params: Any) -> tuple[int, ...]:
    """candidates: (beam, token)."""
    beams, token_ids = zip(*candidates, strict=True)
    strings = StopStrings(SamplingParams(stop=stop, **params), TEXTS)  # type: ignore[arg-type]
    found = BeamCandidates(0, (0.0,) * len(beams), beams, token_ids)
    return strings.completed(found, batch, list(range(len(batch.num_tokens))))


def test_a_stop_string_ends_in_the_last_token_or_it_does_not_count() -> None:
    batch = batch_of([1, 2], [2, 1])  # "abc", "cab"
    assert completed("abc", batch, [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]) == (3, 4)
    assert completed(["x", "cc"], batch, [(0, 1), (0, 2), (1, 2)]) == (1,)
    assert completed("bca", batch, [(0, 3), (1, 3)]) == (0, 1)  # inside of one token, too


def test_only_the_output_counts() -> None:
    batch = batch_of([], prompt=(1, 2))
    assert completed("abca", batch, [(0, 1)]) == ()
    assert completed("abca", batch_of([1, 2]), [(0, 1)]) == (0,)


def test_tokens_that_are_parts_of_a_character() -> None:
    batch = batch_of([1, HALF], [1, 7])
    assert completed("ü", batch, [(0, REST), (1, REST), (0, HALF)]) == (0,)
    assert completed("bü", batch, [(0, REST), (1, REST)]) == (0,)


@pytest.mark.parametrize(("skips", "expected"), [(True, (0,)), (False, ())])
def test_special_tokens_are_text_if_they_are_shown(skips: bool, expected: tuple[int, ...]) -> None:
    batch = batch_of([1, EOS, UNKNOWN])
    assert completed("abc", batch, [(0, 2)], skip_special_tokens=skips) == expected
    assert completed("</s>c", batch, [(0, 2)], skip_special_tokens=skips) == ((0,) if not skips else ())


def test_texts_are_read_once_beside_the_steps(tmp_path: Path) -> None:
    path = save_tiny("bart", tmp_path, with_tokenizer=True)
    service, told, done = TokenTextService(str(path), None, 262), [], Event()

    def tell(error: InvalidRequestError | None) -> None:
        told.append(error)
        done.set()

    service.prepare(tell)
    assert done.wait(30) and told == [None]
    texts = service.get()
    assert len(texts.tokens) == 262 and set(texts.tokens[4:260]) == {bytes([byte]) for byte in range(256)}
    assert service.get() is texts
    service.close()


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    service, told, done = TokenTextService(str(save_tiny("bart", tmp_path)), None, 260), [], Event()
    service.prepare(lambda error: (told.append(error), done.set()))  # type: ignore[func-returns-value]
    assert done.wait(30)
    (error,) = told
    assert isinstance(error, InvalidRequestError) and error.param == "stop"
    service.close()
