"""The fields of a request that ask for beam search, in vLLM's, Aphrodite's and transformers' names.

vLLM and Aphrodite: `use_beam_search` with `best_of` beams, or `n` if that is not set. transformers: `num_beams`, and
`beam_width` for the same; one beam is no beam search. Either way `n` hypotheses are returned.
"""

from __future__ import annotations

from typing import Any

from trivium.errors import InvalidRequestError
from trivium.params import MAX_BEAM_WIDTH, BeamSettings, check_int
from trivium_gateway.openai_protocol import GenerationFields

_WIDTHS = ("num_beams", "beam_width")
# field -> (its name in BeamSettings, the value that means the same with and without beams)
_SETTINGS: dict[str, tuple[str, object]] = {
    "length_penalty": ("length_penalty", 1),
    "early_stopping": ("early_stopping", False),
    "num_beam_groups": ("num_groups", 1),
    "diversity_penalty": ("diversity_penalty", 0),
}


def wants_beams(request: GenerationFields) -> bool:
    """Whether `request` asks for beam search; what it asks for may still be wrong."""
    return bool(request.use_beam_search) or any((getattr(request, name) or 1) != 1 for name in _WIDTHS)


def width_field(request: GenerationFields) -> str:
    """The field that tells the number of beams, where beams are wanted."""
    return next((name for name in (*_WIDTHS, "best_of") if getattr(request, name) is not None), "n")


def given_beams(request: GenerationFields) -> dict[str, Any]:
    """What `request` says about beam search, by the names that `resolve_sampling` takes.

    `beam` of None if it wants none, whatever the checkpoint's default. Raises InvalidRequestError for values out of
    range and fields that contradict each other.
    """
    for name in _WIDTHS:
        if getattr(request, name) is not None:
            check_int(name, getattr(request, name), 1, MAX_BEAM_WIDTH)
    settings = {field: value for field in _SETTINGS if (value := getattr(request, field)) is not None}
    if not wants_beams(request):
        if request.use_beam_search is None and all(getattr(request, name) is None for name in _WIDTHS):
            return settings
        _check_unused(request)
        return {"beam": None}
    if request.use_beam_search is False:
        raise _conflict(f"use_beam_search is false, but {width_field(request)} asks for beams", "use_beam_search")
    name = width_field(request)
    width = 1 if getattr(request, name) is None else getattr(request, name)
    for other in ("beam_width", "best_of"):
        if getattr(request, other) not in (None, width):
            raise _conflict(f"{name} and {other} differ: both are the number of beams", other)
    beam = BeamSettings(width=width, **{_SETTINGS[field][0]: value for field, value in settings.items()})
    return {"num_beams": width, **settings} if width > 1 else {"beam": beam}


def _check_unused(request: GenerationFields) -> None:
    for field, (_, neutral) in _SETTINGS.items():
        if getattr(request, field) not in (None, neutral):
            raise InvalidRequestError(f"{field} needs beam search: set num_beams or use_beam_search", param=field)


def _conflict(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="conflicting_parameters")
