"""From a caller's `Prompt` to an `EncodedPrompt`: the one place that knows how prompts of each model kind are built.

Owns the rules of decoder prompts (DESIGN 6): a single prompt of an encoder-decoder model is the encoder input, the
decoder prompt is then the start token; explicit decoder ids that do not begin with the start token get it prepended;
decoder text is tokenized without special tokens. A target language is told to the model as its family wants it; where
that is the first generated token, a decoder prompt that is given contains it already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from trivium.config import ModelInfo
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import (
    EncodedPair,
    EncodedPrompt,
    PairTexts,
    Prompt,
    PromptEmbeds,
    SingletonPrompt,
    prompt_languages,
    split_prompt,
)
from trivium.params import SamplingParams, check_int
from trivium.prompt_truncation import Truncation
from trivium.structured_outputs import StructuredOutputsParams


class TextEncoder(Protocol):
    """Anything that turns texts into token ids for one model."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        ...

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
    if is_explicit and not info.is_encoder_decoder:
        raise InvalidRequestError(
            f"model {info.name} is decoder-only and takes no encoder-decoder prompt",
            param="encoder_prompt",
            code="not_encoder_decoder",
        )
    source_language, target_language = prompt_languages(prompt)
    if not info.is_encoder_decoder:
        for name, language in (("source_language", source_language), ("target_language", target_language)):
            if language is not None:
                raise InvalidRequestError(
                    f"model {info.name} is decoder-only and takes no {name}", param=name, code="not_encoder_decoder"
                )
        embeds = await _read_embeds(main, info)
        if embeds is not None:
            _refuse_cut(embeds, truncation, info)
            return EncodedPrompt(token_ids=embeds.placeholder_ids, embeds=embeds)
        ids, text = await _encode_side(main, encoder, info, "prompt")
        if truncation is not None and len(ids) > truncation.limit(info):
            around = tuple((await encoder.encode([""]))[0]) if _is_text(main) else ()
            ids = truncation.cut(ids, around, info)
        if not ids and info.bos_token_id is not None:
            ids = (info.bos_token_id,)
        if not ids:
            raise InvalidRequestError("prompt is empty", param="prompt", code="empty_prompt")
        return EncodedPrompt(token_ids=ids, text=text)
    encoder_ids, encoder_text = _read_side(main, info, "encoder_prompt" if is_explicit else "prompt")
    encoder_embeds = await _read_embeds(main, info)
    if encoder_embeds is not None:
        _refuse_cut(encoder_embeds, truncation, info)
        encoder_ids = encoder_embeds.placeholder_ids
    if isinstance(decoder, dict) and "prompt_embeds" in decoder:
        raise InvalidRequestError(
            "decoder_prompt must be text or token ids: only the encoder input may be embeddings",
            param="decoder_prompt",
            code="invalid_prompt_embeds",
        )
    decoder_ids, decoder_text = (None, None) if decoder is None else _read_side(decoder, info, "decoder_prompt")
    if source_language is not None and encoder_ids is not None:
        raise InvalidRequestError(
            "source_language is for text: token ids and embeddings are taken as they are", param="source_language"
        )
    texts = PairTexts(
        encoder=encoder_text if encoder_ids is None else None,
        decoder=decoder_text if decoder_ids is None else None,
        source_language=source_language,
        target_language=target_language,
    )
    pair = EncodedPair() if texts.is_empty else await encoder.encode_pair(texts)
    if truncation is not None:
        added: tuple[int, ...] = ()
        if encoder_ids is None and len(pair.encoder) > truncation.limit(info):
            added = (await encoder.encode_pair(replace(texts, encoder="", decoder=None))).encoder
        encoder_ids = truncation.cut(pair.encoder if encoder_ids is None else encoder_ids, added, info)
    encoder_ids = pair.encoder if encoder_ids is None else encoder_ids
    if not encoder_ids:
        raise InvalidRequestError("the encoder input is empty", param="prompt", code="empty_prompt")
    start = prompt.get("decoder_start_token_id") if isinstance(prompt, dict) else None
    token_ids, forced_bos = _decoder_prompt(pair.decoder if decoder_ids is None else decoder_ids, pair, info, start)
    return EncodedPrompt(
        token_ids=token_ids,
        text=decoder_text,
        encoder_token_ids=encoder_ids,
        encoder_text=encoder_text,
        forced_bos_token_id=forced_bos,
        encoder_embeds=encoder_embeds,
    )


def _refuse_cut(embeds: PromptEmbeds, truncation: Truncation | None, info: ModelInfo) -> None:
    if truncation is not None and embeds.num_tokens > truncation.limit(info):
        raise InvalidRequestError(
            f"prompt_embeds has {embeds.num_tokens} rows: truncate_prompt_tokens cuts text and token ids only",
            param="prompt_embeds",
            code="invalid_prompt_embeds",
        )


async def _read_embeds(side: SingletonPrompt, info: ModelInfo) -> PromptEmbeds | None:
    """The embeddings of `side`, checked, or None if it is something else.

    Megabytes are read and hashed, so that is done in a thread.
    """
    if isinstance(side, str) or "prompt_embeds" not in side:
        return None
    from trivium.prompt_embeds import to_prompt_embeds  # numpy is loaded only where embeddings are used

    if not info.hidden_size:
        raise InvalidRequestError(
            f"model {info.name} takes no prompt embeddings", param="prompt_embeds", code="invalid_prompt_embeds"
        )
    embeds = await asyncio.to_thread(to_prompt_embeds, side["prompt_embeds"])
    if embeds.hidden_size != info.hidden_size:
        raise InvalidRequestError(
            f"prompt_embeds has rows of {embeds.hidden_size} numbers, the model's hidden size is {info.hidden_size}",
            param="prompt_embeds",
            code="invalid_prompt_embeds",
        )
    return embeds


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
    if prompt.embeds is not None and sampling.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs are of tokens: prompt_embeds has none",
            param="prompt_logprobs",
            code="conflicting_parameters",
        )
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


async def _encode_side(
    side: SingletonPrompt, encoder: TextEncoder, info: ModelInfo, param: str
) -> tuple[tuple[int, ...], str | None]:
    ids, text = _read_side(side, info, param)
    if ids is None:
        assert text is not None, "a side is ids or text"
        ids = tuple((await encoder.encode([text]))[0])
    return ids, text


def _is_text(side: SingletonPrompt) -> bool:
    return isinstance(side, str) or "prompt_token_ids" not in side


def _read_side(side: SingletonPrompt, info: ModelInfo, param: str) -> tuple[tuple[int, ...] | None, str | None]:
    """Token ids, None if there are none yet, and the text. Raises InvalidRequestError for ids that do not exist."""
    if isinstance(side, str):
        return None, side
    if "prompt_embeds" in side:
        return None, None
    if "prompt_token_ids" not in side:
        return None, side["prompt"]
    ids = tuple(side["prompt_token_ids"])
    check_vocabulary(ids, info, param)
    return ids, side.get("prompt")


def check_vocabulary(ids: Sequence[int], info: ModelInfo, param: str) -> None:
    """Raise InvalidRequestError naming the first id that model `info` does not have."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"{param}[{position}] is {token_id}, the vocabulary has {info.vocab_size} tokens",
                param=f"{param}[{position}]",
                code="invalid_token_id",
            )
