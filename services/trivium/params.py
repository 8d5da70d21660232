"""How tokens are chosen: `SamplingParams`, validated once for REST, gRPC and offline use.

Names, defaults and ranges are vLLM's. A value out of range raises InvalidRequestError with the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trivium.errors import InvalidRequestError

MAX_N = 16
MAX_STOP = 16
MAX_STOP_CHARS = 256
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy
MAX_TOP_K = 2**31 - 1
_INT64 = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation.

    n: choices per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. max_tokens: None means up to the
    model's limit. stop: strings that end a choice and are not part of its text unless `include_stop_str_in_output`.
    seed: any int64; None draws one. min_tokens: neither EOS nor a stop token id is chosen before so many tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_ids(self.stop_token_ids, "stop_token_ids"))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        check_int("n", self.n, 1, MAX_N)
        check_float("temperature", self.temperature, 0.0, 2.0)
        check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_int("top_k", self.top_k, 0, MAX_TOP_K)
        check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_int("seed", self.seed, -_INT64, _INT64 - 1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}", param="min_tokens"
            )
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r:.40}", param=name)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True", param="stop")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise InvalidRequestError unless `value` is an int (no bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer in [{low}, {high}], got {value!r:.40}", param=name)


def check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise InvalidRequestError unless `value` is a finite number in [low, high], or (low, high] with `low_open`."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not low <= value <= high or (low_open and value == low):  # type: ignore[operator]
        bracket = "(" if low_open else "["
        raise InvalidRequestError(f"{name} must be a number in {bracket}{low}, {high}], got {value!r:.40}", param=name)


def _as_stop(stop: object) -> tuple[str, ...]:
    items = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(items, Sequence) or len(items) > MAX_STOP:
        raise InvalidRequestError(
            f"stop must be a string or a list of at most {MAX_STOP} strings", param="stop", code="invalid_stop"
        )
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {item!r:.40}",
                param="stop",
                code="invalid_stop",
            )
    return tuple(items)


def _as_ids(ids: object, name: str) -> tuple[int, ...]:
    items = () if ids is None else ids
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)) or len(items) > 1024:
        raise InvalidRequestError(f"{name} must be a list of at most 1024 token ids", param=name)
    for token_id in items:
        check_int(name, token_id, 0, 2**31 - 1)
    return tuple(dict.fromkeys(items))
