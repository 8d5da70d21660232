"""From a caller's `Prompt` to an `EncodedPrompt`: the one place that knows how prompts of each model kind are built.

Owns the rules of decoder prompts (DESIGN 6): a single prompt of an encoder-decoder model is the encoder input, the
decoder prompt is then the start token; explicit decoder ids that do not begin with the start token get it prepended;
decoder text is tokenized without special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trivium.config import ModelInfo
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import EncodedPrompt, Prompt, SingletonPrompt, split_prompt
from trivium.params import SamplingParams


class TextEncoder(Protocol):
    """Anything that turns texts into token ids for one model."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        ...


async def encode_prompt(prompt: Prompt, encoder: TextEncoder, info: ModelInfo) -> EncodedPrompt:
    """Tokenize the texts in `prompt` and build what model `info` takes.

    Raises InvalidRequestError for a malformed prompt, an explicit pair on a decoder-only model, token ids outside the
    vocabulary, and an empty prompt where the model needs one.
    """
    main, decoder, is_explicit = split_prompt(prompt)
    if is_explicit and not info.is_encoder_decoder:
        raise InvalidRequestError(
            f"model {info.name} is decoder-only and takes no encoder-decoder prompt",
            param="encoder_prompt",
            code="not_encoder_decoder",
        )
    if not info.is_encoder_decoder:
        ids, text = await _encode_side(main, encoder, info, "prompt")
        if not ids and info.bos_token_id is not None:
            ids = (info.bos_token_id,)
        if not ids:
            raise InvalidRequestError("prompt is empty", param="prompt", code="empty_prompt")
        return EncodedPrompt(token_ids=ids, text=text)
    encoder_ids, encoder_text = await _encode_side(main, encoder, info, "encoder_prompt" if is_explicit else "prompt")
    if not encoder_ids:
        raise InvalidRequestError("the encoder input is empty", param="prompt", code="empty_prompt")
    decoder_ids: tuple[int, ...] = ()
    decoder_text: str | None = None
    if decoder is not None:
        decoder_ids, decoder_text = await _encode_side(
            decoder, encoder, info, "decoder_prompt", add_special_tokens=False
        )
    return EncodedPrompt(
        token_ids=with_decoder_start(decoder_ids, info),
        text=decoder_text,
        encoder_token_ids=encoder_ids,
        encoder_text=encoder_text,
    )


def with_decoder_start(ids: Sequence[int], info: ModelInfo) -> tuple[int, ...]:
    """`ids` with the model's decoder start token in front, unless it is there already."""
    start = info.decoder_start_token_id
    assert start is not None, f"encoder-decoder model {info.name} without decoder_start_token_id"
    return tuple(ids) if ids and ids[0] == start else (start, *ids)


def resolve_max_tokens(prompt: EncodedPrompt, sampling: SamplingParams, info: ModelInfo) -> int:
    """The output limit of a request that fits model `info`.

    `max_tokens=None` becomes what is left of the context. Raises ContextLengthError, with both numbers, if prompt and
    `max_tokens` do not fit, and InvalidRequestError if `min_tokens` cannot be reached.
    """
    room = info.max_model_len - len(prompt.token_ids)
    side = "decoder_prompt" if info.is_encoder_decoder else "prompt"
    if prompt.encoder_token_ids is not None and len(prompt.encoder_token_ids) > info.max_encoder_len:
        raise ContextLengthError(
            f"the encoder input has {len(prompt.encoder_token_ids)} tokens, the model takes {info.max_encoder_len}",
            param="encoder_prompt",
        )
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt.token_ids)} tokens, the model's context holds {info.max_model_len} "
            "with at least one generated token",
            param=side,
        )
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    if max_tokens > room:
        raise ContextLengthError(
            f"prompt ({len(prompt.token_ids)} tokens) and max_tokens ({max_tokens}) exceed the model's context of "
            f"{info.max_model_len} tokens",
            param="max_tokens",
        )
    if sampling.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, but at most {max_tokens} tokens fit", param="min_tokens"
        )
    return max_tokens


async def _encode_side(
    side: SingletonPrompt, encoder: TextEncoder, info: ModelInfo, param: str, *, add_special_tokens: bool = True
) -> tuple[tuple[int, ...], str | None]:
    if isinstance(side, str):
        text: str | None = side
    elif "prompt_token_ids" in side:
        ids = tuple(side["prompt_token_ids"])
        check_vocabulary(ids, info, param)
        return ids, side.get("prompt")
    else:
        text = side["prompt"]
    assert text is not None
    (encoded,) = await encoder.encode([text], add_special_tokens=add_special_tokens)
    return tuple(encoded), text


def check_vocabulary(ids: Sequence[int], info: ModelInfo, param: str) -> None:
    """Raise InvalidRequestError naming the first id that model `info` does not have."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"{param}[{position}] is {token_id}, the vocabulary has {info.vocab_size} tokens",
                param=f"{param}[{position}]",
                code="invalid_token_id",
            )
