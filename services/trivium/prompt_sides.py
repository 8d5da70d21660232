"""One side of a prompt as it is read: token ids, rows of embeddings, or text that has still to be encoded.

In a prompt of parts, and until a whole prompt is put together, `EMBEDDED` stands in the ids where a row goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from trivium.config import ModelInfo
from trivium.embeds import MAX_EMBEDS_BYTES, Places, PromptEmbeds
from trivium.errors import InvalidRequestError
from trivium.inputs import SingletonPrompt

EMBEDDED = -1

Ids = tuple[int, ...]


class PlainEncoder(Protocol):
    """Anything that turns texts into token ids for one model."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        ...


@dataclass(frozen=True, slots=True)
class Side:
    """ids: None where `text` is all there is; EMBEDDED where the rows of `embeds` go. text: what the caller wrote."""

    ids: Ids | None
    text: str | None = None
    embeds: PromptEmbeds | None = None

    @property
    def is_text(self) -> bool:
        return self.ids is None


async def read_side(side: SingletonPrompt, encoder: PlainEncoder, info: ModelInfo, param: str) -> Side:
    """Read `side`, whose shape was checked. Raises InvalidRequestError for ids and rows that the model has not."""
    if isinstance(side, str):
        return Side(None, side)
    if "prompt_parts" in side:
        return await _read_parts([*side["prompt_parts"]], encoder, info, param)
    if "prompt_embeds" in side:
        embeds = await _read_embeds(side["prompt_embeds"], info)
        return Side((EMBEDDED,) * embeds.num_tokens, None, embeds)
    if "prompt_token_ids" not in side:
        return Side(None, side["prompt"])
    ids = tuple(side["prompt_token_ids"])
    check_vocabulary(ids, info, param)
    return Side(ids, side.get("prompt"))


def place(ids: Ids, embeds: PromptEmbeds | None) -> tuple[Ids, PromptEmbeds | None]:
    """A whole prompt and its embeddings: placeholders in the ids, and the places of the rows."""
    if embeds is None:
        return ids, None
    places: list[tuple[int, int]] = []
    start = 0
    for is_row, run in groupby(ids, EMBEDDED.__eq__):
        end = start + len(list(run))
        if is_row:
            places.append((start, end))
        start = end
    return tuple(max(token_id, 0) for token_id in ids), embeds.at(_whole_or(tuple(places), embeds))


def _whole_or(places: Places, embeds: PromptEmbeds) -> Places | None:
    return None if places == ((0, embeds.num_tokens),) else places


def check_vocabulary(ids: Sequence[int], info: ModelInfo, param: str) -> None:
    """Raise InvalidRequestError naming the first id that model `info` does not have."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"{param}[{position}] is {token_id}, the vocabulary has {info.vocab_size} tokens",
                param=f"{param}[{position}]",
                code="invalid_token_id",
            )


async def _read_parts(parts: list[SingletonPrompt], encoder: PlainEncoder, info: ModelInfo, param: str) -> Side:
    sides = [await read_side(part, encoder, info, f"{param}[{index}]") for index, part in enumerate(parts)]
    texts = [side.text for side in sides if side.ids is None and side.text is not None]
    encoded = iter(await encoder.encode(texts, add_special_tokens=False) if texts else [])
    ids = [token_id for side in sides for token_id in (next(encoded) if side.ids is None else side.ids)]
    rows = [side.embeds for side in sides if side.embeds is not None]
    if sum(len(part.data) for part in rows) > MAX_EMBEDS_BYTES:
        raise InvalidRequestError(
            f"prompt_embeds of one prompt are larger than {MAX_EMBEDS_BYTES} bytes of float32",
            param="prompt_embeds",
            code="too_long",
        )
    shown = [side.text for side in sides if side.embeds is None]
    known = [text for text in shown if text is not None]
    text = "".join(known) if known and len(known) == len(shown) else None
    return Side(tuple(ids), text, PromptEmbeds.joined(rows) if rows else None)


async def _read_embeds(value: object, info: ModelInfo) -> PromptEmbeds:
    """Embeddings, checked. Megabytes are read and hashed, so that is done in a thread."""
    from trivium.prompt_embeds import to_prompt_embeds  # numpy is loaded only where embeddings are used

    if not info.hidden_size:
        raise InvalidRequestError(
            f"model {info.name} takes no prompt embeddings", param="prompt_embeds", code="invalid_prompt_embeds"
        )
    embeds = await asyncio.to_thread(to_prompt_embeds, value)
    if embeds.hidden_size != info.hidden_size:
        raise InvalidRequestError(
            f"prompt_embeds has rows of {embeds.hidden_size} numbers, the model's hidden size is {info.hidden_size}",
            param="prompt_embeds",
            code="invalid_prompt_embeds",
        )
    return embeds
