"""The sampling parameters that speak of the model's tokens or encoder, which only it and its tokenizer know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trivium.config import ModelInfo
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import ResolvedSampling, resolve_sampling, with_necessities
from trivium.inputs import EncodedPrompt
from trivium.params import MAX_BAD_WORD_TOKENS, SamplingParams
from trivium.prompt_sides import check_vocabulary
from trivium.prompts import TextEncoder

_UNSET = SamplingParams()


async def resolve_bad_words(sampling: SamplingParams, encoder: TextEncoder) -> SamplingParams:
    """`sampling` with the token sequences of its `bad_words`, each with and without a space before it.

    Nothing to do if there are no bad words or their sequences are known already. Raises InvalidRequestError for a
    word that has no tokens or too many.
    """
    if not sampling.bad_words or sampling.bad_words_token_ids:
        return sampling
    words = [word.lstrip() for word in sampling.bad_words]
    texts = [text for word in words for text in (word, " " + word)]
    sequences = await encoder.encode(texts, add_special_tokens=False)
    for text, ids in zip(texts, sequences, strict=True):
        if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(f"bad_words: {text!r:.40} has {len(ids)} tokens", param="bad_words")
    return replace(sampling, bad_words_token_ids=tuple(tuple(ids) for ids in sequences))


async def resolve_texts(sampling: SamplingParams, encoder: TextEncoder) -> SamplingParams:
    """`resolve_bad_words`, once the grammar that the output must follow has been found good.

    Raises InvalidRequestError.
    """
    if sampling.structured_outputs is not None:
        await encoder.check_grammar(sampling.structured_outputs)
    return await resolve_bad_words(sampling, encoder)


async def complete_sampling(
    given: Mapping[str, Any],
    prompt: EncodedPrompt,
    info: ModelInfo,
    encoder: TextEncoder,
    *,
    fallback_max_tokens: int | None,
) -> ResolvedSampling:
    """`resolve_sampling`, the tokens of bad words, and `with_necessities`, all checked. Raises InvalidRequestError."""
    resolved = resolve_sampling(given, prompt, info, fallback_max_tokens=fallback_max_tokens)
    sampling = await resolve_texts(resolved.sampling, encoder)
    check_sampling_tokens(sampling, info)
    return replace(resolved, sampling=with_necessities(sampling, prompt, info))


def check_sampling_tokens(sampling: SamplingParams, info: ModelInfo) -> None:
    """Raise InvalidRequestError naming a parameter with a token id or of an encoder that model `info` does not have."""
    if not info.is_encoder_decoder:
        _check_decoder_only(sampling, info)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        check_vocabulary(getattr(sampling, name), info, name)
    if sampling.forced_bos_token_id is not None and sampling.forced_bos_token_id >= info.vocab_size:
        raise InvalidRequestError(
            f"forced_bos_token_id is {sampling.forced_bos_token_id}, the vocabulary has {info.vocab_size} tokens",
            param="forced_bos_token_id",
            code="invalid_token_id",
        )
    check_vocabulary(sampling.stop_token_ids, info, "stop_token_ids")
    check_vocabulary(sampling.allowed_token_ids or (), info, "allowed_token_ids")
    check_vocabulary(sampling.dry_sequence_breaker_ids, info, "dry_sequence_breaker_ids")
    check_vocabulary(sampling.suppress_tokens, info, "suppress_tokens")
    check_vocabulary(sampling.begin_suppress_tokens, info, "begin_suppress_tokens")
    if sampling.forced_bos_token_id is not None:
        check_vocabulary([sampling.forced_bos_token_id], info, "forced_bos_token_id")
    for ids in sampling.bad_words_token_ids:
        check_vocabulary(ids, info, "bad_words_token_ids")
    for token_id in sampling.logit_bias:
        if token_id >= info.vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token {token_id}, the vocabulary has {info.vocab_size} tokens",
                param="logit_bias",
                code="invalid_logit_bias",
            )


def _check_decoder_only(sampling: SamplingParams, info: ModelInfo) -> None:
    """A forced BOS is refused, too: it would act only on prompts of one token, and otherwise be ignored."""
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "forced_bos_token_id"):
        if getattr(sampling, name) != getattr(_UNSET, name):
            raise InvalidRequestError(
                f"{name} needs an encoder-decoder model, {info.name} is decoder-only",
                param=name,
                code="not_encoder_decoder",
            )
