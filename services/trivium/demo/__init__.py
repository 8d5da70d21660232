"""Two small models that ship with the server, and the corpora and the training that made them.

`trivium-translate` turns English into French, German or Spanish over a closed world of numbers, dates, clock times
and short phrases; `trivium-chat` answers short questions about arithmetic, the calendar and units. This module owns
only where they lie, so importing it costs nothing.
"""

from __future__ import annotations

from pathlib import Path

_DIRECTORIES = {"trivium-translate": "trivium_translate", "trivium-chat": "trivium_chat"}

BUNDLED_MODELS: tuple[str, ...] = tuple(_DIRECTORIES)


def model_path(name: str) -> Path | None:
    """The checkpoint directory of a bundled model, or None when no model of that name is bundled."""
    directory = _DIRECTORIES.get(name)
    return None if directory is None else Path(__file__).resolve().parent / directory
