"""Beam search over REST: what the fields of all dialects mean, and what is refused under which name."""

from __future__ import annotations

from typing import Any

import pytest

from trivium.params import BeamSettings
from unit.gateway.fakes import World, post

COMPLETION = ("/v1/completions", {"model": "tiny", "prompt": "a"})
CHAT = ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})


def width(beams: int, **settings: Any) -> BeamSettings:
    return BeamSettings(width=beams, **settings)


MEANINGS: list[tuple[dict[str, Any], BeamSettings | None, int]] = [
    ({"use_beam_search": True}, width(1), 1),
    ({"use_beam_search": True, "n": 3}, width(3), 3),
    ({"use_beam_search": True, "best_of": 4}, width(4), 1),
    ({"use_beam_search": True, "best_of": 4, "n": 2}, width(4), 2),
    ({"use_beam_search": True, "best_of": 4, "n": 2, "stream": True}, width(4), 2),
    ({"use_beam_search": True, "n": 2, "num_beams": 4}, width(4), 2),
    ({"use_beam_search": True, "num_beams": 1}, width(1), 1),
    ({"use_beam_search": True, "num_return_sequences": 3}, width(3), 3),
    ({"num_beams": 4}, width(4), 1),
    ({"beam_width": 4, "num_return_sequences": 3}, width(4), 3),
    ({"num_beams": 4, "beam_width": 4, "best_of": 4, "n": 2, "num_return_sequences": 2}, width(4), 2),
    ({"num_beams": 3, "length_penalty": 2}, width(3, length_penalty=2), 1),
    ({"num_beams": 3, "length_penalty": -0.5}, width(3, length_penalty=-0.5), 1),
    ({"num_beams": 3, "early_stopping": True}, width(3, early_stopping=True), 1),
    ({"num_beams": 3, "early_stopping": "never"}, width(3, early_stopping="never"), 1),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1}, width(4, num_groups=2, diversity_penalty=1), 1),
    ({"num_beams": 4, "temperature": 0}, width(4), 1),
    ({"num_beams": 1}, None, 1),
    ({"beam_width": 1, "use_beam_search": False, "n": 2}, None, 2),
    ({"num_return_sequences": 2}, None, 2),
    ({"length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1, "diversity_penalty": 0}, None, 1),
    ({"use_beam_search": None, "num_beams": None, "length_penalty": None, "early_stopping": None}, None, 1),
]


@pytest.mark.parametrize(("path", "base"), [COMPLETION, CHAT])
@pytest.mark.parametrize(("fields", "beam", "n"), MEANINGS, ids=[f"{row[0]!s:.60}" for row in MEANINGS])
def test_meaning(
    world: World, path: str, base: dict[str, Any], fields: dict[str, Any], beam: BeamSettings | None, n: int
) -> None:
    answer = post(world.port, path, base | fields)
    assert answer.status == 200
    sampling = world.tiny.requests[-1].sampling
    assert (sampling.beam, sampling.n, sampling.best_of) == (beam, n, None)
    assert sampling.temperature == (1.0 if beam is None else 0.0)
    assert "stream" in fields or len(answer.json["choices"]) == n


INVALID = "invalid_value"
CONFLICT = "conflicting_parameters"
WRONG_TYPE = "invalid_type"
ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"num_beams": 4, "temperature": 0.7}, INVALID, "temperature"),
    ({"use_beam_search": True, "n": 2, "temperature": 1}, INVALID, "temperature"),
    ({"num_beams": 17}, INVALID, "num_beams"),
    ({"num_beams": 0}, INVALID, "num_beams"),
    ({"beam_width": 17}, INVALID, "beam_width"),
    ({"beam_width": -1}, INVALID, "beam_width"),
    ({"use_beam_search": True, "n": 17}, INVALID, "n"),
    ({"use_beam_search": True, "best_of": 17}, INVALID, "best_of"),
    ({"use_beam_search": True, "best_of": 0}, INVALID, "best_of"),
    ({"use_beam_search": True, "num_return_sequences": 17}, INVALID, "num_return_sequences"),
    ({"num_beams": 2, "n": 3}, INVALID, "n"),
    ({"num_beams": 2, "num_return_sequences": 3}, INVALID, "num_return_sequences"),
    ({"num_return_sequences": 0}, INVALID, "num_return_sequences"),
    ({"use_beam_search": True, "best_of": 2, "n": 3}, INVALID, "n"),
    ({"length_penalty": 0.9}, INVALID, "length_penalty"),
    ({"num_beams": 1, "length_penalty": 2}, INVALID, "length_penalty"),
    ({"early_stopping": True}, INVALID, "early_stopping"),
    ({"num_beam_groups": 2}, INVALID, "num_beam_groups"),
    ({"diversity_penalty": 0.5}, INVALID, "diversity_penalty"),
    ({"num_beams": 4, "length_penalty": 1e3}, INVALID, "length_penalty"),
    ({"num_beams": 4, "early_stopping": "always"}, INVALID, "early_stopping"),
    ({"num_beams": 4, "num_beam_groups": 3}, INVALID, "num_beam_groups"),
    ({"num_beams": 4, "diversity_penalty": 0.5}, INVALID, "diversity_penalty"),
    ({"num_beams": 4, "use_beam_search": False}, CONFLICT, "use_beam_search"),
    ({"num_beams": 4, "beam_width": 3}, CONFLICT, "beam_width"),
    ({"num_beams": 4, "best_of": 3}, CONFLICT, "best_of"),
    ({"num_beams": 4, "n": 2, "num_return_sequences": 3}, CONFLICT, "num_return_sequences"),
    ({"use_beam_search": 1}, WRONG_TYPE, "use_beam_search"),
    ({"num_beams": 2.5}, WRONG_TYPE, "num_beams"),
    ({"beam_width": "4"}, WRONG_TYPE, "beam_width"),
    ({"num_beams": 4, "early_stopping": 1}, WRONG_TYPE, "early_stopping"),
    ({"num_beams": 4, "length_penalty": True}, WRONG_TYPE, "length_penalty"),
]


@pytest.mark.parametrize(("path", "base"), [COMPLETION, CHAT])
@pytest.mark.parametrize(("fields", "code", "param"), ROWS, ids=[f"{row[0]!s:.60}" for row in ROWS])
def test_refused(world: World, path: str, base: dict[str, Any], fields: dict[str, Any], code: str, param: str) -> None:
    answer = post(world.port, path, base | fields)
    assert answer.error == (400, code, param)
    assert param in answer.json["error"]["message"]
