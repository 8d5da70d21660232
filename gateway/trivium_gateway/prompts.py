"""The JSON forms of a completion prompt, and what each becomes.

| `prompt` | `encoder_prompt` | `decoder_prompt` | meaning |
|---|---|---|---|
| one or several | - | - | prompt, or encoder input of an encoder-decoder model |
| one or several | - | one | encoder input(s), all with this decoder prompt |
| - | one | one or null | both sides of one encoder-decoder prompt |

Each side is text or token ids; several prompts are a list of texts or a list of id lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import (
    EncodedPrompt,
    ExplicitEncoderDecoderPrompt,
    Prompt,
    SingletonPrompt,
    TokensPrompt,
    check_token_ids,
)
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


def completion_prompts(request: CompletionRequest, info: ModelInfo) -> list[PlacedPrompt]:
    """The prompts of `request`, at least one. Raises InvalidRequestError that names the part that is wrong."""
    decoder = request.decoder_prompt
    if request.encoder_prompt is None and request.prompt is None:
        param = "prompt" if decoder is UNSET else "encoder_prompt"
        raise InvalidRequestError(f"{param} is missing", param=param, code="missing_prompt")
    if request.encoder_prompt is None:
        sides = _several(request.prompt, _main_limit(info))
        if decoder is UNSET:
            return [PlacedPrompt(prompt, param) for prompt, param in sides]
        target = _decoder_side(decoder, info)
        return [PlacedPrompt(_pair(prompt, target), param) for prompt, param in sides]
    if request.prompt is not None:
        raise InvalidRequestError(
            "give the encoder input as prompt or as encoder_prompt, not both",
            param="encoder_prompt",
            code="conflicting_parameters",
        )
    if decoder is UNSET and info.is_encoder_decoder:
        raise InvalidRequestError(
            "decoder_prompt is missing: give it, set it to null, or use prompt instead of encoder_prompt",
            param="decoder_prompt",
            code="missing_prompt",
        )
    source = _side(request.encoder_prompt, "encoder_prompt", _main_limit(info))
    target = None if decoder is UNSET else _decoder_side(decoder, info)
    return [PlacedPrompt(_pair(source, target), "encoder_prompt")]


async def encode_prompts(prompts: list[PlacedPrompt], engine: EngineClient, info: ModelInfo) -> list[EncodedPrompt]:
    """Token ids of all `prompts`, or the error of one with its place in the request."""
    return await run_all([_encode(prompt, engine, info) for prompt in prompts])


async def _encode(placed: PlacedPrompt, engine: EngineClient, info: ModelInfo) -> EncodedPrompt:
    try:
        return await encode_prompt(placed.prompt, engine, info)
    except InvalidRequestError as error:
        part = "encoder_prompt" if (error.param or "").startswith("encoder_prompt[") else "prompt"
        raise relocated(error, part=part, to=placed.param) from None


def _pair(encoder: SingletonPrompt, decoder: SingletonPrompt | None) -> ExplicitEncoderDecoderPrompt:
    return ExplicitEncoderDecoderPrompt(encoder_prompt=encoder, decoder_prompt=decoder)


def _main_limit(info: ModelInfo) -> _Limit:
    return (
        _Limit(info.max_encoder_len, "encoder_prompt")
        if info.is_encoder_decoder
        else _Limit(info.max_model_len, "prompt")
    )


def _decoder_side(value: Any, info: ModelInfo) -> SingletonPrompt | None:
    return None if value is None else _side(value, "decoder_prompt", _Limit(info.max_model_len, "decoder_prompt"))


def _several(value: Any, limit: _Limit) -> list[tuple[SingletonPrompt, str]]:
    if not isinstance(value, list) or (value and isinstance(value[0], (int, float))):
        return [(_side(value, "prompt", limit), "prompt")]
    if not value:
        raise _invalid("prompt is an empty list", "prompt")
    if len(value) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken",
            param="prompt",
            code="too_many_prompts",
        )
    kind = type(value[0])
    sides: list[tuple[SingletonPrompt, str]] = []
    for index, item in enumerate(value):
        param = f"prompt[{index}]"
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


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_prompt")
