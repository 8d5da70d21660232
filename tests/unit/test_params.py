import math
from typing import Any

import pytest

from trivium.errors import InvalidRequestError
from trivium.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("top_k", 10**12),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 1.2),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as info:
        SamplingParams(**{name: value})
    assert info.value.param == name and name in info.value.message


def test_defaults_and_normal_forms() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[3, 3, 4], top_k=-1)  # type: ignore[arg-type]
    assert params.stop == ("x",) and params.stop_token_ids == (3, 4) and params.top_k == 0
    assert (SamplingParams().max_tokens, SamplingParams().temperature) == (16, 1.0)


def test_a_tiny_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=1e-9).is_greedy and not SamplingParams(temperature=0.01).is_greedy


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
