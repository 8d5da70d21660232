"""The JSON forms of a completion prompt, and what each becomes.

| `prompt` | `encoder_prompt` | `decoder_prompt` | meaning |
|---|---|---|---|
| one or several | - | - | prompt, or encoder input of an encoder-decoder model |
| - | one or several | -, null | encoder input |
| either of them: one or several || one | encoder input(s), all with this decoder prompt |
| either of them: several || as many | each encoder input with its decoder prompt |

Each side is text or token ids, and the sides may differ in kind; several are a list of texts or a list of id lists.
`prompt_embeds`, one or several, are further prompts (or encoder inputs), ahead of the others. A `prompt` of "" beside
them is none: some clients cannot leave it out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from trivium.config import ModelInfo
from trivium.embeds import PromptEmbeds
from trivium.engine import EngineClient
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import (
    EmbedsPrompt,
    EncodedPrompt,
    ExplicitEncoderDecoderPrompt,
    Prompt,
    SingletonPrompt,
    TextPrompt,
    TokensPrompt,
    check_token_ids,
)
from trivium.prompt_truncation import Truncation
from trivium.prompts import encode_prompt
from trivium_gateway.concurrency import run_all
from trivium_gateway.errors import relocated
from trivium_gateway.openai_protocol import CompletionRequest

MAX_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class PlacedPrompt:
    """A prompt and the part of the request it came from, such as `prompt[2]`."""

    prompt: Prompt
    param: str


@dataclass(frozen=True, slots=True)
class _Limit:
    """The most token ids that one side can have, and the name under which a longer one is refused."""

    max_ids: int
    param: str


async def embeds_prompts(value: Any) -> list[PlacedPrompt]:
    """What the field `prompt_embeds` holds, decoded in a thread. Raises InvalidRequestError that names the part."""
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise InvalidRequestError(
            f"prompt_embeds must be one or a list of 1 to {MAX_PROMPTS}, got {len(items)}",
            param="prompt_embeds",
            code="too_many_prompts" if items else "invalid_prompt_embeds",
        )
    params = [f"prompt_embeds[{index}]" if isinstance(value, list) else "prompt_embeds" for index in range(len(items))]
    decoded = [await decode(item, param) for item, param in zip(items, params, strict=True)]
    return [
        PlacedPrompt(EmbedsPrompt(prompt_embeds=embeds), param) for embeds, param in zip(decoded, params, strict=True)
    ]


async def decode(value: Any, param: str) -> PromptEmbeds:
    """Embeddings as a client sent them in `param`, decoded in a thread. Raises InvalidRequestError."""
    from trivium.prompt_embeds import decode_embeds  # numpy is loaded only where embeddings are used

    try:
        return await asyncio.to_thread(decode_embeds, value)
    except InvalidRequestError as error:
        raise relocated(error, part="prompt_embeds", to=param) from None


def completion_prompts(
    request: CompletionRequest, info: ModelInfo, embeds: Sequence[PlacedPrompt] = ()
) -> list[PlacedPrompt]:
    """The prompts of `request`, at least one: `embeds`, which are its `prompt_embeds`, then the others.

    Raises InvalidRequestError that names the part that is wrong.
    """
    if embeds and request.prompt == "":
        request = msgspec.structs.replace(request, prompt=None)
    decoder, is_explicit = request.decoder_prompt, request.encoder_prompt is not None
    if not is_explicit and request.prompt is None and not embeds:
        param = "prompt" if decoder is UNSET else "encoder_prompt"
        raise InvalidRequestError(f"{param} is missing", param=param, code="missing_prompt")
    if is_explicit and request.prompt is not None:
        raise InvalidRequestError(
            "give the encoder input as prompt or as encoder_prompt, not both",
            param="encoder_prompt",
            code="conflicting_parameters",
        )
    sides: list[tuple[SingletonPrompt, str]] = [(placed.prompt, placed.param) for placed in embeds]  # type: ignore[misc]
    if is_explicit:
        sides += _several(request.encoder_prompt, "encoder_prompt", _main_limit(request, info))
    elif request.prompt is not None:
        sides += _several(request.prompt, "prompt", _main_limit(request, info))
    if len(sides) > MAX_PROMPTS:
        raise _too_many(len(sides), "prompt", MAX_PROMPTS)
    if decoder is UNSET and not is_explicit:
        prompts: list[Prompt] = [prompt for prompt, _ in sides]
    else:
        targets = _decoder_sides(None if decoder is UNSET else decoder, len(sides), info)
        prompts = [
            ExplicitEncoderDecoderPrompt(encoder_prompt=prompt, decoder_prompt=target)
            for (prompt, _), target in zip(sides, targets, strict=True)
        ]
    return [
        PlacedPrompt(with_languages(prompt, request.source_language, request.target_language), param)
        for prompt, (_, param) in zip(prompts, sides, strict=True)
    ]


def with_languages(prompt: Prompt, source_language: str | None, target_language: str | None) -> Prompt:
    """`prompt` with the languages that a request names."""
    if source_language is None and target_language is None:
        return prompt
    languages = {"source_language": source_language, "target_language": target_language}
    named: Any = {**(TextPrompt(prompt=prompt) if isinstance(prompt, str) else prompt), **languages}
    return named  # type: ignore[no-any-return]


async def encode_prompts(
    prompts: list[PlacedPrompt], engine: EngineClient, info: ModelInfo, truncation: Truncation | None = None
) -> list[EncodedPrompt]:
    """Token ids of all `prompts`, or the error of one with its place in the request."""
    return await run_all([_encode(prompt, engine, info, truncation) for prompt in prompts])


async def _encode(
    placed: PlacedPrompt, engine: EngineClient, info: ModelInfo, truncation: Truncation | None
) -> EncodedPrompt:
    try:
        return await encode_prompt(placed.prompt, engine, info, truncation=truncation)
    except InvalidRequestError as error:
        if (error.param or "").startswith("encoder_prompt["):
            raise relocated(error, part="encoder_prompt", to=placed.param) from None
        raise placed_error(error, placed) from None


def placed_error(error: InvalidRequestError, placed: PlacedPrompt) -> InvalidRequestError:
    """`error` about a prompt, with its place in the request."""
    part = "prompt_embeds" if placed.param.startswith("prompt_embeds") else "prompt"
    return relocated(error, part=part, to=placed.param)


def _main_limit(request: CompletionRequest, info: ModelInfo) -> _Limit:
    """No limit for what will be cut: a body holds only so many ids."""
    max_ids, param = (
        (info.max_encoder_len, "encoder_prompt") if info.is_encoder_decoder else (info.max_model_len, "prompt")
    )
    return _Limit(max_ids if request.truncate_prompt_tokens is None else sys.maxsize, param)


def _decoder_sides(value: Any, num_prompts: int, info: ModelInfo) -> list[SingletonPrompt | None]:
    """One decoder prompt for each of `num_prompts` encoder inputs: as many as there are, or one for all of them."""
    if value is None:
        return [None] * num_prompts
    limit = _Limit(info.max_model_len, "decoder_prompt")
    sides = [(_side(value, "decoder_prompt", limit), "")] if value == [] else _several(value, "decoder_prompt", limit)
    if isinstance(value, list) and value and isinstance(value[0], (str, list)) and len(sides) != num_prompts:
        raise _invalid(f"{num_prompts} encoder prompts but {len(sides)} decoder prompts", "decoder_prompt")
    return [side for side, _ in sides] if len(sides) == num_prompts else [sides[0][0]] * num_prompts


def inputs(value: Any, name: str, info: ModelInfo, *, is_cut: bool, max_inputs: int) -> list[PlacedPrompt]:
    """Texts or lists of token ids, for the model or its encoder. Raises InvalidRequestError."""
    max_ids = info.max_encoder_len if info.is_encoder_decoder else info.max_model_len
    limit = _Limit(sys.maxsize if is_cut else max_ids, name)
    return [PlacedPrompt(side, param) for side, param in _several(value, name, limit, max_prompts=max_inputs)]


def _several(
    value: Any, name: str, limit: _Limit, *, max_prompts: int = MAX_PROMPTS
) -> list[tuple[SingletonPrompt, str]]:
    if not isinstance(value, list) or (value and isinstance(value[0], (int, float))):
        return [(_side(value, name, limit), name)]
    if not value:
        raise _invalid(f"{name} is an empty list", name)
    if len(value) > max_prompts:
        raise _too_many(len(value), name, max_prompts)
    kind = type(value[0])
    sides: list[tuple[SingletonPrompt, str]] = []
    for index, item in enumerate(value):
        param = f"{name}[{index}]"
        if type(item) is not kind or not isinstance(item, (str, list)) or not item:
            raise _invalid(f"{param} must be non-empty and text or token ids, like the other prompts", param)
        sides.append((_side(item, param, limit), param))
    return sides


def _side(value: Any, param: str, limit: _Limit) -> SingletonPrompt:
    """Text or token ids. Lists over the limit of the model are refused before each id is looked at."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _invalid(f"{param} must be text or a list of token ids", param)
    if len(value) > limit.max_ids:
        raise ContextLengthError(f"{param} has {len(value)} tokens, the model takes {limit.max_ids}", param=limit.param)
    return TokensPrompt(prompt_token_ids=check_token_ids(value, param))


def _too_many(count: int, param: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"{count} prompts in one request, at most {most} are taken", param=param, code="too_many_prompts"
    )


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_prompt")
