"""From a caller's `Prompt` to an `EncodedPrompt`: the one place that knows how prompts of each model kind are built.

Owns the rules of decoder prompts (DESIGN 6): a single prompt of an encoder-decoder model is the encoder input, the
decoder prompt is then the start token; explicit decoder ids that do not begin with the start token get it prepended;
decoder text is tokenized without special tokens. A target language is told to the model as its family wants it; where
that is the first generated token, a decoder prompt that is given contains it already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from trivium.config import ModelInfo
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import (
    EncodedPair,
    EncodedPrompt,
    PairTexts,
    Prompt,
    prompt_languages,
    split_prompt,
)
from trivium.params import SamplingParams, check_int
from trivium.prompt_sides import PlainEncoder, Side, place, read_side
from trivium.prompt_truncation import Truncation
from trivium.structured_outputs import StructuredOutputsParams


class TextEncoder(PlainEncoder, Protocol):
    """Anything that turns texts into token ids for one model."""

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """Both sides of an encoder-decoder prompt."""
        ...

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Raise InvalidRequestError naming the part of `params` that the model cannot be held to."""
        ...


async def encode_prompt(
    prompt: Prompt, encoder: TextEncoder, info: ModelInfo, *, truncation: Truncation | None = None
) -> EncodedPrompt:
    """Tokenize the texts in `prompt` and build what model `info` takes.

    truncation: what to do with a prompt, or an encoder input, of more tokens than wanted; decoder prompts stay whole.

    Raises InvalidRequestError for a malformed prompt, an explicit pair on a decoder-only model, token ids outside the
    vocabulary, and an empty prompt where the model needs one.
    """
    main, decoder, is_explicit = split_prompt(prompt)
    if info.is_encoder_decoder:
        sides = await read_side(main, encoder, info, "encoder_prompt" if is_explicit else "prompt"), Side(())
        if decoder is not None:
            sides = sides[0], await read_side(decoder, encoder, info, "decoder_prompt")
        return await _encode_pair(prompt, sides, encoder, info, truncation)
    if is_explicit:
        raise InvalidRequestError(
            f"model {info.name} is decoder-only and takes no encoder-decoder prompt",
            param="encoder_prompt",
            code="not_encoder_decoder",
        )
    for name, language in zip(("source_language", "target_language"), prompt_languages(prompt), strict=True):
        if language is not None:
            raise InvalidRequestError(
                f"model {info.name} is decoder-only and takes no {name}", param=name, code="not_encoder_decoder"
            )
    side = await read_side(main, encoder, info, "prompt")
    ids = tuple((await encoder.encode([side.text or ""]))[0]) if side.ids is None else side.ids
    if truncation is not None and len(ids) > truncation.limit(info):
        _refuse_cut(side)
        around = tuple((await encoder.encode([""]))[0]) if side.is_text else ()
        ids = truncation.cut(ids, around, info)
    if not ids and info.bos_token_id is not None:
        ids = (info.bos_token_id,)
    if not ids:
        raise InvalidRequestError("prompt is empty", param="prompt", code="empty_prompt")
    ids, embeds = place(ids, side.embeds)
    return EncodedPrompt(token_ids=ids, text=side.text, embeds=embeds)


async def _encode_pair(
    prompt: Prompt, sides: tuple[Side, Side], encoder: TextEncoder, info: ModelInfo, truncation: Truncation | None
) -> EncodedPrompt:
    """The prompt of an encoder-decoder model, of its two sides."""
    source, target = sides
    source_language, target_language = prompt_languages(prompt)
    if source_language is not None and not source.is_text:
        raise InvalidRequestError(
            "source_language is for text: token ids and embeddings are taken as they are", param="source_language"
        )
    texts = PairTexts(
        encoder=source.text if source.is_text else None,
        decoder=target.text if target.is_text else None,
        source_language=source_language,
        target_language=target_language,
    )
    pair = EncodedPair() if texts.is_empty else await encoder.encode_pair(texts)
    encoder_ids = pair.encoder if source.ids is None else source.ids
    if truncation is not None and len(encoder_ids) > truncation.limit(info):
        _refuse_cut(source)
        is_text = source.is_text
        added = (await encoder.encode_pair(replace(texts, encoder="", decoder=None))).encoder if is_text else ()
        encoder_ids = truncation.cut(encoder_ids, added, info)
    if not encoder_ids:
        raise InvalidRequestError("the encoder input is empty", param="prompt", code="empty_prompt")
    start = prompt.get("decoder_start_token_id") if isinstance(prompt, dict) else None
    token_ids, forced_bos = _decoder_prompt(pair.decoder if target.ids is None else target.ids, pair, info, start)
    token_ids, embeds = place(token_ids, target.embeds)
    encoder_ids, encoder_embeds = place(encoder_ids, source.embeds)
    return EncodedPrompt(
        token_ids=token_ids,
        text=target.text,
        encoder_token_ids=encoder_ids,
        encoder_text=source.text,
        forced_bos_token_id=forced_bos,
        embeds=embeds,
        encoder_embeds=encoder_embeds,
    )


def _refuse_cut(side: Side) -> None:
    if side.embeds is not None:
        raise InvalidRequestError(
            f"prompt_embeds has {side.embeds.num_tokens} rows: truncate_prompt_tokens cuts text and token ids only",
            param="prompt_embeds",
            code="invalid_prompt_embeds",
        )


def _decoder_prompt(
    ids: tuple[int, ...], pair: EncodedPair, info: ModelInfo, given_start: object
) -> tuple[tuple[int, ...], int | None]:
    """The whole decoder prompt, and what must be generated first: start token, target language, `ids`.

    Whatever `ids` begin with is not put there twice.
    """
    if given_start is not None:
        check_int("decoder_start_token_id", given_start, 0, info.vocab_size - 1)
    start = given_start if isinstance(given_start, int) else pair.decoder_start_token_id
    start = info.decoder_start_token_id if start is None else start
    if start is None:
        raise missing_target_language()
    rest = ids[1:] if ids and ids[0] == start else ids
    forced = pair.forced_bos_token_id
    prefix = pair.decoder_prefix if forced is None or not rest else (forced,)
    if rest[: len(prefix)] != prefix:
        rest = (*prefix, *rest)
    is_told = rest or given_start is not None or info.forced_bos_token_id is not None
    if pair.needs_target_language and not is_told and pair.decoder_start_token_id is None:
        raise missing_target_language()
    return (start, *rest), None if rest else forced


def missing_target_language() -> InvalidRequestError:
    """A multilingual model was not told which language to write."""
    return InvalidRequestError(
        "the model is multilingual: target_language is missing", param="target_language", code="missing_language"
    )


def resolve_max_tokens(prompt: EncodedPrompt, sampling: SamplingParams, info: ModelInfo) -> int:
    """The output limit of a request that fits model `info`.

    `max_tokens=None` becomes what is left of the context. Raises ContextLengthError, with both numbers, if prompt and
    `max_tokens` do not fit, and InvalidRequestError if `min_tokens` cannot be reached.
    """
    room = info.max_model_len - len(prompt.token_ids)
    side = "decoder_prompt" if info.is_encoder_decoder else "prompt" if prompt.embeds is None else "prompt_embeds"
    if prompt.encoder_token_ids is not None and len(prompt.encoder_token_ids) > info.max_encoder_len:
        raise ContextLengthError(
            f"the encoder input has {len(prompt.encoder_token_ids)} tokens, the model takes {info.max_encoder_len}",
            param="encoder_prompt" if prompt.encoder_embeds is None else "prompt_embeds",
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
