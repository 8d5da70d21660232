"""Prompts, and pairs of texts on their way to the tokenizer and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivium.embeds import PromptEmbeds, RawTensor
from trivium.errors import InvalidRequestError
from trivium.inputs import (
    EmbedsPrompt,
    EncodedPair,
    EncodedPrompt,
    ExplicitEncoderDecoderPrompt,
    MixedPrompt,
    PairTexts,
    Prompt,
    SingletonPrompt,
    TextPrompt,
    TokensPrompt,
    is_explicit_encoder_decoder,
    prompt_languages,
)
from trivium.v1 import tokenizer_pb2, types_pb2


def pair_texts_to_proto(texts: PairTexts, model: str) -> tokenizer_pb2.EncodePairRequest:
    return tokenizer_pb2.EncodePairRequest(
        model=model,
        encoder_text=texts.encoder,
        decoder_text=texts.decoder,
        source_language=texts.source_language,
        target_language=texts.target_language,
    )


def pair_texts_from_proto(message: tokenizer_pb2.EncodePairRequest) -> PairTexts:
    def optional(name: str) -> str | None:
        return getattr(message, name) if message.HasField(name) else None

    return PairTexts(
        encoder=optional("encoder_text"),
        decoder=optional("decoder_text"),
        source_language=optional("source_language"),
        target_language=optional("target_language"),
    )


def encoded_pair_to_proto(pair: EncodedPair) -> tokenizer_pb2.EncodePairResponse:
    return tokenizer_pb2.EncodePairResponse(
        encoder=types_pb2.TokensPrompt(ids=pair.encoder),
        decoder=types_pb2.TokensPrompt(ids=pair.decoder),
        decoder_prefix=types_pb2.TokensPrompt(ids=pair.decoder_prefix),
        decoder_start_token_id=pair.decoder_start_token_id,
        forced_bos_token_id=pair.forced_bos_token_id,
        needs_target_language=pair.needs_target_language,
    )


def encoded_pair_from_proto(message: tokenizer_pb2.EncodePairResponse) -> EncodedPair:
    return EncodedPair(
        encoder=tuple(message.encoder.ids),
        decoder=tuple(message.decoder.ids),
        decoder_prefix=tuple(message.decoder_prefix.ids),
        decoder_start_token_id=message.decoder_start_token_id if message.HasField("decoder_start_token_id") else None,
        forced_bos_token_id=message.forced_bos_token_id if message.HasField("forced_bos_token_id") else None,
        needs_target_language=message.needs_target_language,
    )


def rendered_to_proto(ids: Sequence[int]) -> tokenizer_pb2.RenderResponse:
    """ids: of a rendered chat, -1 - k where its k-th embeddings stand."""
    marks = [(position, -1 - token_id) for position, token_id in enumerate(ids) if token_id < 0]
    return tokenizer_pb2.RenderResponse(
        prompt=types_pb2.TokensPrompt(ids=[max(token_id, 0) for token_id in ids]),
        embeds=[tokenizer_pb2.EmbedsMark(position=position, number=number) for position, number in marks],
    )


def rendered_from_proto(message: tokenizer_pb2.RenderResponse) -> list[int]:
    """Inverse of `rendered_to_proto`."""
    ids = list(message.prompt.ids)
    for mark in message.embeds:
        ids[mark.position] = -1 - mark.number
    return ids


def singleton_to_proto(prompt: SingletonPrompt) -> types_pb2.SingletonPrompt:
    if isinstance(prompt, str):
        return types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text=prompt))
    if "prompt_parts" in prompt:
        parts = [singleton_to_proto(part) for part in prompt["prompt_parts"]]
        return types_pb2.SingletonPrompt(mixed=types_pb2.MixedPrompt(parts=parts))
    if "prompt_token_ids" in prompt:
        tokens = types_pb2.TokensPrompt(ids=prompt["prompt_token_ids"], text=prompt.get("prompt"))
        return types_pb2.SingletonPrompt(tokens=tokens)
    if "prompt_embeds" in prompt:
        embeds = prompt["prompt_embeds"]
        assert isinstance(embeds, PromptEmbeds), "embeddings are checked before they are sent"
        shape = (embeds.num_tokens, embeds.hidden_size)
        return types_pb2.SingletonPrompt(embeds=types_pb2.EmbedsPrompt(data=embeds.data, shape=shape, dtype="float32"))
    return types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text=prompt["prompt"]))


def singleton_from_proto(message: types_pb2.SingletonPrompt, param: str) -> SingletonPrompt:
    """Raises InvalidRequestError naming `param` if no kind is set."""
    match message.WhichOneof("kind"):
        case "text":
            return TextPrompt(prompt=message.text.text)
        case "tokens":
            prompt = TokensPrompt(prompt_token_ids=list(message.tokens.ids))
            if message.tokens.HasField("text"):
                prompt["prompt"] = message.tokens.text
            return prompt
        case "embeds":
            embeds = message.embeds
            return EmbedsPrompt(prompt_embeds=RawTensor(embeds.data, tuple(embeds.shape), embeds.dtype))
        case "mixed":
            parts: list[Any] = [singleton_from_proto(part, param) for part in message.mixed.parts]
            return MixedPrompt(prompt_parts=parts)
        case _:
            raise InvalidRequestError(f"{param} has neither text nor tokens", param=param, code="missing_prompt")


def prompt_to_proto(prompt: Prompt) -> types_pb2.Prompt:
    source, target = prompt_languages(prompt)
    if not is_explicit_encoder_decoder(prompt):
        single = singleton_to_proto(prompt)  # type: ignore[arg-type]
        return types_pb2.Prompt(single=single, source_language=source, target_language=target)
    encoder, decoder = prompt["encoder_prompt"], prompt["decoder_prompt"]  # type: ignore[index, typeddict-item]
    pair = types_pb2.EncoderDecoderPrompt(
        encoder=singleton_to_proto(encoder),
        decoder=None if decoder is None else singleton_to_proto(decoder),
        decoder_start_token_id=prompt.get("decoder_start_token_id"),  # type: ignore[union-attr, arg-type]
    )
    return types_pb2.Prompt(encoder_decoder=pair, source_language=source, target_language=target)


def prompt_from_proto(message: types_pb2.Prompt) -> Prompt:
    """Raises InvalidRequestError if no kind is set."""
    languages: dict[str, Any] = {
        name: getattr(message, name) for name in ("source_language", "target_language") if message.HasField(name)
    }
    match message.WhichOneof("kind"):
        case "single":
            single = singleton_from_proto(message.single, "prompt")
            assert isinstance(single, dict), "a prompt from a message is a dict"
            single.update(languages)  # type: ignore[typeddict-item]
            return single
        case "encoder_decoder":
            pair = message.encoder_decoder
            decoder = singleton_from_proto(pair.decoder, "decoder_prompt") if pair.HasField("decoder") else None
            encoder = singleton_from_proto(pair.encoder, "encoder_prompt")
            prompt = ExplicitEncoderDecoderPrompt(encoder_prompt=encoder, decoder_prompt=decoder)
            if pair.HasField("decoder_start_token_id"):
                prompt["decoder_start_token_id"] = pair.decoder_start_token_id
            prompt.update(languages)  # type: ignore[typeddict-item]
            return prompt
        case _:
            raise InvalidRequestError("prompt is missing", param="prompt", code="missing_prompt")


def encoded_prompt_to_prompt(prompt: EncodedPrompt) -> Prompt:
    """The form of `prompt` without text to encode, which encodes to `prompt` again."""
    main = _encoded_side(prompt.token_ids, prompt.text, prompt.embeds)
    if prompt.encoder_token_ids is None:
        return main
    return ExplicitEncoderDecoderPrompt(
        encoder_prompt=_encoded_side(prompt.encoder_token_ids, prompt.encoder_text, prompt.encoder_embeds),
        decoder_prompt=main,
        decoder_start_token_id=prompt.token_ids[0],
    )


def _encoded_side(ids: Sequence[int], text: str | None, embeds: PromptEmbeds | None) -> SingletonPrompt:
    if embeds is not None and embeds.places is None:
        return EmbedsPrompt(prompt_embeds=embeds)
    if embeds is not None:
        parts: list[Any] = []
        end = 0
        for (start, stop), rows in zip(embeds.spans, embeds.parts(), strict=True):
            parts += [TokensPrompt(prompt_token_ids=list(ids[end:start]))] if end < start else []
            parts.append(EmbedsPrompt(prompt_embeds=rows))
            end = stop
        parts += [TokensPrompt(prompt_token_ids=list(ids[end:]))] if end < len(ids) else []
        return MixedPrompt(prompt_parts=parts)
    side = TokensPrompt(prompt_token_ids=list(ids))
    if text is not None:
        side["prompt"] = text
    return side
