"""The form of a table of hostile requests: what is sent, and what must come back. Rows are data; nothing here sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from time_limits import ANSWER_S

LLAMA, BART, NOBODY = "llama", "bart", "nobody"  # decoder-only, encoder-decoder, and a model without an engine
VOCAB_SIZE = 260
MAX_MODEL_LEN = 512  # of LLAMA
MAX_ENCODER_LEN = 128  # of BART
HIDDEN_SIZE, ENCODER_HIDDEN_SIZE = 48, 32
KEY = "s3cret-Key"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Missing(Enum):
    """Stands for a field that is left out."""

    FIELD = "missing"


MISSING = Missing.FIELD


class Door(Enum):
    """Which gateway is asked: OPEN takes embeddings; LOCKED has a key, a rate limit and is strict."""

    OPEN = "open"
    LOCKED = "locked"


@dataclass(frozen=True, slots=True)
class Call:
    """An ordinary HTTP request."""

    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error: status, code and param, with `headers` in the answer. closes: and then the connection is closed."""

    status: int
    code: str
    param: str | None = None
    headers: tuple[str, ...] = ()
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A 200 whose JSON fulfils `holds`."""

    holds: Callable[[Any], object] = lambda answer: True
    status: int = 200


@dataclass(frozen=True, slots=True)
class Row:
    """name: the number in the plan, and which of its cases. sent: bytes go to a socket as they are."""

    name: str
    sent: Call | bytes
    answer: Refusal | Taken
    door: Door = Door.OPEN
    max_s: float = field(default=ANSWER_S, kw_only=True)

    @property
    def number(self) -> str:
        return self.name.split()[0]


Maker = Callable[..., Call]


def bad(code: str, param: str | None = None, status: int = 400, *headers: str) -> Refusal:
    return Refusal(status, code, param, headers)


def to(path: str, body: object, **headers: str) -> Call:
    """A request with a JSON body, or with these bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return Call(path, data, tuple(named.items()))


def completion(model: str = LLAMA, /, **fields: Any) -> Call:
    return to(COMPLETIONS, _merged({"model": model, "prompt": "a", "max_tokens": 2}, fields))


def chat(model: str = LLAMA, /, **fields: Any) -> Call:
    return to(CHAT, _merged({"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}, fields))


def translation(**fields: Any) -> Call:
    """A completion of the encoder-decoder model, with the prompts that `fields` have."""
    return to(COMPLETIONS, _merged({"model": BART, "max_tokens": 2}, fields))


def _merged(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (base | fields).items() if value is not MISSING}


def values(
    number: str,
    name: str,
    given: Iterable[Any],
    code: str,
    *,
    on: tuple[Maker, ...] = (completion, chat),
    **others: Any,
) -> list[Row]:
    """One row per value of the field `name` and endpoint; `others` are further fields."""
    beside = f" {others}" if others else ""
    return [
        Row(
            f"{number} {maker.__name__} {name}={value!s:.40}{beside}",
            maker(**others, **{name: value}),
            bad(code, name),
        )
        for value in given
        for maker in on
    ]


def cases(number: str, *rows: tuple[str, Call | bytes, Refusal | Taken], door: Door = Door.OPEN) -> list[Row]:
    return [Row(f"{number} {name}", sent, answer, door) for name, sent, answer in rows]
