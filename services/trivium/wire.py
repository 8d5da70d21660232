"""Every dataclass <-> protobuf conversion, once. Nothing else builds or reads `trivium.v1` domain messages.

A decoder raises ColumnError for malformed columns and InvalidRequestError for values a client may not send.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trivium import columns
from trivium.config import GenerationDefaults, ModelInfo
from trivium.errors import InvalidRequestError, TriviumError, error_from_status
from trivium.inputs import (
    EmbedsPrompt,
    EncodedPair,
    EncodedPrompt,
    ExplicitEncoderDecoderPrompt,
    GenerationRequest,
    PairTexts,
    Prompt,
    PromptEmbeds,
    RawTensor,
    ResumedChoice,
    SingletonPrompt,
    TextPrompt,
    TokensPrompt,
    is_explicit_encoder_decoder,
    prompt_languages,
)
from trivium.outputs import ChoiceDelta, FinishReason, TokenLogprobs
from trivium.params import BeamSettings, SamplingParams
from trivium.pooling import PoolingParams
from trivium.step import (
    BeamCandidates,
    CachedRequestData,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    SlotFailure,
    SlotLogprobs,
    TokenRun,
)
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import executor_pb2, scheduler_pb2, tokenizer_pb2, types_pb2

_FINISH_TO_PROTO: dict[FinishReason, types_pb2.FinishReason] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}

_EARLY_STOPPING_TO_PROTO: dict[bool | str, types_pb2.EarlyStopping] = {
    False: types_pb2.EARLY_STOPPING_FALSE,
    True: types_pb2.EARLY_STOPPING_TRUE,
    "never": types_pb2.EARLY_STOPPING_NEVER,
}
_EARLY_STOPPING_FROM_PROTO = {value: key for key, value in _EARLY_STOPPING_TO_PROTO.items()}

_SAMPLING_SCALARS = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "forced_bos_token_id",
    "prompt_lookup_num_tokens",
    "logprobs",
    "prompt_logprobs",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "xtc_threshold",
    "xtc_probability",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "detokenize",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
)
_SAMPLING_IDS = ("stop_token_ids", "dry_sequence_breaker_ids", "suppress_tokens", "begin_suppress_tokens")
_BEAM_SCALARS = ("length_penalty", "num_groups", "diversity_penalty")
_INFO_SCALARS = (
    "name",
    "architecture",
    "is_encoder_decoder",
    "max_model_len",
    "max_encoder_len",
    "vocab_size",
    "dtype",
    "block_size",
    "num_blocks",
    "num_host_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_loras",
    "hidden_size",
)
_INFO_OPTIONAL = (
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_DEFAULTS_IDS = ("suppress_tokens", "begin_suppress_tokens")
_DEFAULTS_SCALARS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)


def sampling_params_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    scalars = {name: getattr(params, name) for name in _SAMPLING_SCALARS}
    return types_pb2.SamplingParams(
        **{name: value for name, value in scalars.items() if value is not None},
        **{name: getattr(params, name) for name in _SAMPLING_IDS},
        stop=params.stop,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=params.bad_words,
        bad_words_token_ids=[types_pb2.TokenSequence(ids=ids) for ids in params.bad_words_token_ids],
        logit_bias=[types_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias.items()],
        unlimited_tokens=params.max_tokens is None,
        beam=None if params.beam is None else _beam_to_proto(params.beam),
        structured_outputs=None
        if params.structured_outputs is None
        else structured_outputs_to_proto(params.structured_outputs),
    )


def sampling_params_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """Unset scalars take the defaults of SamplingParams. Raises InvalidRequestError."""
    return SamplingParams(**sampling_fields_from_proto(message))


def sampling_fields_from_proto(message: types_pb2.SamplingParams) -> dict[str, Any]:
    """What `message` says, by the names of SamplingParams; what it leaves unset is absent.

    Raises InvalidRequestError.
    """
    fields: dict[str, Any] = {name: getattr(message, name) for name in _SAMPLING_SCALARS if message.HasField(name)}
    if message.unlimited_tokens:
        if "max_tokens" in fields:
            raise InvalidRequestError("max_tokens is set together with unlimited_tokens", param="max_tokens")
        fields["max_tokens"] = None
    if len({item.token_id for item in message.logit_bias}) < len(message.logit_bias):
        raise InvalidRequestError("logit_bias names a token twice", param="logit_bias", code="invalid_logit_bias")
    lists: dict[str, Any] = {name: tuple(getattr(message, name)) for name in _SAMPLING_IDS}
    lists |= {
        "stop": tuple(message.stop),
        "allowed_token_ids": tuple(message.allowed_token_ids),
        "bad_words": tuple(message.bad_words),
        "bad_words_token_ids": tuple(tuple(sequence.ids) for sequence in message.bad_words_token_ids),
        "logit_bias": {item.token_id: item.bias for item in message.logit_bias},
    }
    if message.HasField("beam"):
        fields["beam"] = _beam_from_proto(message.beam)
    if message.HasField("structured_outputs"):
        fields["structured_outputs"] = structured_outputs_from_proto(message.structured_outputs)
    return fields | {name: value for name, value in lists.items() if value}


def structured_outputs_to_proto(params: StructuredOutputsParams) -> types_pb2.StructuredOutputs:
    value: Any = getattr(params, params.kind)
    if params.kind == "choice":
        value = types_pb2.StructuredChoice(values=value)
    return types_pb2.StructuredOutputs(
        **{params.kind: value},
        disable_any_whitespace=params.disable_any_whitespace,
        whitespace_pattern=params.whitespace_pattern,
    )


def structured_outputs_from_proto(message: types_pb2.StructuredOutputs) -> StructuredOutputsParams:
    """Raises InvalidRequestError."""
    kind = message.WhichOneof("kind")
    fields: dict[str, Any] = {} if kind is None else {kind: getattr(message, kind)}
    if kind == "choice":
        fields[kind] = tuple(message.choice.values)
    if message.HasField("whitespace_pattern"):
        fields["whitespace_pattern"] = message.whitespace_pattern
    return StructuredOutputsParams(**fields, disable_any_whitespace=message.disable_any_whitespace)


def _beam_to_proto(beam: BeamSettings) -> types_pb2.BeamSettings:
    return types_pb2.BeamSettings(
        width=beam.width,
        early_stopping=_EARLY_STOPPING_TO_PROTO[beam.early_stopping],
        **{name: getattr(beam, name) for name in _BEAM_SCALARS},
    )


def _beam_from_proto(message: types_pb2.BeamSettings) -> BeamSettings:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _BEAM_SCALARS if message.HasField(name)}
    if message.early_stopping not in _EARLY_STOPPING_FROM_PROTO:
        raise InvalidRequestError("early_stopping is unknown", param="early_stopping")
    early_stopping = _EARLY_STOPPING_FROM_PROTO[message.early_stopping]
    return BeamSettings(width=message.width, early_stopping=early_stopping, **fields)


def model_info_to_proto(info: ModelInfo) -> types_pb2.ModelInfo:
    optional = {name: getattr(info, name) for name in _INFO_OPTIONAL}
    return types_pb2.ModelInfo(
        **{name: getattr(info, name) for name in _INFO_SCALARS},
        **{name: value for name, value in optional.items() if value is not None},
        eos_token_ids=info.eos_token_ids,
        adapters=info.adapters,
        generation_defaults=_defaults_to_proto(info.generation_defaults),
    )


def model_info_from_proto(message: types_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        **{name: getattr(message, name) for name in _INFO_SCALARS},
        **{name: getattr(message, name) if message.HasField(name) else None for name in _INFO_OPTIONAL},  # type: ignore[arg-type]
        eos_token_ids=tuple(message.eos_token_ids),
        adapters=tuple(message.adapters),
        generation_defaults=_defaults_from_proto(message.generation_defaults),
    )


def _defaults_to_proto(defaults: GenerationDefaults) -> types_pb2.GenerationDefaults:
    scalars = {name: getattr(defaults, name) for name in _DEFAULTS_SCALARS}
    early_stopping = defaults.early_stopping
    return types_pb2.GenerationDefaults(
        **{name: value for name, value in scalars.items() if value is not None},
        **{name: getattr(defaults, name) for name in _DEFAULTS_IDS},
        bad_words_ids=[types_pb2.TokenSequence(ids=ids) for ids in defaults.bad_words_ids],
        early_stopping=None if early_stopping is None else _EARLY_STOPPING_TO_PROTO[early_stopping],
    )


def _defaults_from_proto(message: types_pb2.GenerationDefaults) -> GenerationDefaults:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _DEFAULTS_SCALARS if message.HasField(name)}
    fields |= {name: tuple(getattr(message, name)) for name in _DEFAULTS_IDS}
    if message.HasField("early_stopping"):
        fields["early_stopping"] = _EARLY_STOPPING_FROM_PROTO[message.early_stopping]
    return GenerationDefaults(**fields, bad_words_ids=tuple(tuple(item.ids) for item in message.bad_words_ids))


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


def singleton_to_proto(prompt: SingletonPrompt) -> types_pb2.SingletonPrompt:
    if isinstance(prompt, str):
        return types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text=prompt))
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
    if prompt.embeds is not None:
        return EmbedsPrompt(prompt_embeds=prompt.embeds)
    main = TokensPrompt(prompt_token_ids=list(prompt.token_ids))
    if prompt.text is not None:
        main["prompt"] = prompt.text
    if prompt.encoder_token_ids is None:
        return main
    encoder: SingletonPrompt
    if prompt.encoder_embeds is not None:
        encoder = EmbedsPrompt(prompt_embeds=prompt.encoder_embeds)
    else:
        encoder = TokensPrompt(prompt_token_ids=list(prompt.encoder_token_ids))
        if prompt.encoder_text is not None:
            encoder["prompt"] = prompt.encoder_text
    return ExplicitEncoderDecoderPrompt(
        encoder_prompt=encoder, decoder_prompt=main, decoder_start_token_id=prompt.token_ids[0]
    )


def generation_request_to_proto(request: GenerationRequest) -> scheduler_pb2.GenerateRequest:
    return scheduler_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt=prompt_to_proto(encoded_prompt_to_prompt(request.prompt)),
        sampling=sampling_params_to_proto(request.sampling),
        stream=request.stream,
        resume=[
            scheduler_pb2.ResumedChoice(
                index=choice.index,
                output_token_ids=choice.output_token_ids,
                emitted_chars=choice.emitted_chars,
                finished=choice.finished,
            )
            for choice in request.resume
        ],
        traceparent=request.traceparent,
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        adapter=request.adapter,
        sampling_is_complete=True,
    )


def embed_to_proto(model: str, prompts: Iterable[Sequence[int]], params: PoolingParams) -> types_pb2.EmbedRequest:
    return types_pb2.EmbedRequest(
        model=model,
        prompts=[types_pb2.TokenSequence(ids=ids) for ids in prompts],
        pooling_type=params.pooling_type or "",
        normalize=params.normalize,
    )


def embed_from_proto(message: types_pb2.EmbedRequest) -> tuple[list[tuple[int, ...]], PoolingParams]:
    """Raises InvalidRequestError."""
    prompts = [tuple(prompt.ids) for prompt in message.prompts]
    return prompts, PoolingParams(pooling_type=message.pooling_type or None, normalize=message.normalize)


def vectors_to_proto(vectors: Sequence[Sequence[float]]) -> types_pb2.EmbedResponse:
    """`vectors` of one length, at least one."""
    flat = (value for vector in vectors for value in vector)
    return types_pb2.EmbedResponse(hidden_size=len(vectors[0]), vectors=columns.pack_floats(flat))


def vectors_from_proto(message: types_pb2.EmbedResponse) -> list[Sequence[float]]:
    """Raises ColumnError."""
    flat, size = columns.unpack_floats(message.vectors), message.hidden_size
    if not size or len(flat) % size:
        raise columns.ColumnError(f"{len(flat)} values are no rows of {size}")
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def resume_from_proto(message: scheduler_pb2.GenerateRequest) -> tuple[ResumedChoice, ...]:
    return tuple(
        ResumedChoice(
            index=choice.index,
            output_token_ids=tuple(choice.output_token_ids),
            emitted_chars=choice.emitted_chars,
            finished=choice.finished,
        )
        for choice in message.resume
    )


def _logprobs_to_proto(values: Iterable[TokenLogprobs]) -> list[types_pb2.TokenLogprobs]:
    return [
        types_pb2.TokenLogprobs(
            logprob=value.logprob,
            rank=value.rank,
            top_ids=columns.pack(value.top_ids),
            top_logprobs=columns.pack_floats(value.top_logprobs),
        )
        for value in values
    ]


def _logprobs_from_proto(messages: Iterable[types_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Raises ColumnError."""
    values = []
    for message in messages:
        top_ids, top_logprobs = columns.unpack(message.top_ids), columns.unpack_floats(message.top_logprobs)
        columns.check_same_length(top_ids=top_ids, top_logprobs=top_logprobs)
        values.append(TokenLogprobs(message.logprob, message.rank, tuple(top_ids), top_logprobs))
    return tuple(values)


def delta_to_proto(delta: ChoiceDelta) -> scheduler_pb2.ChoiceDelta:
    message = scheduler_pb2.ChoiceDelta(
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=_logprobs_to_proto(delta.logprobs),
        prompt_logprobs=_logprobs_to_proto(delta.prompt_logprobs),
        cumulative_logprob=delta.cumulative_logprob,
    )
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH_TO_PROTO[delta.finish_reason]
        _set_stop_reason(message, delta.stop_reason)
    return message


def delta_from_proto(message: scheduler_pb2.ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        finish_reason=_FINISH_FROM_PROTO.get(message.finish_reason),
        stop_reason=_get_stop_reason(message),
        logprobs=_logprobs_from_proto(message.logprobs),
        prompt_logprobs=_logprobs_from_proto(message.prompt_logprobs),
        cumulative_logprob=message.cumulative_logprob if message.HasField("cumulative_logprob") else None,
    )


def delta_batch_to_proto(
    rows: list[tuple[int, ChoiceDelta]], errors: list[tuple[int, TriviumError]]
) -> scheduler_pb2.DeltaBatch:
    """`rows` are (handle, delta), `errors` are (handle, error)."""
    counts, token_ids = columns.pack_ragged([delta.token_ids for _, delta in rows])
    batch = scheduler_pb2.DeltaBatch(
        handles=columns.pack(handle for handle, _ in rows),
        indices=columns.pack(delta.index for _, delta in rows),
        counts=counts,
        token_ids=token_ids,
        texts=[delta.text for _, delta in rows],
        errors=[scheduler_pb2.HandleError(handle=handle, error=error_to_proto(error)) for handle, error in errors],
    )
    for row, (_, delta) in enumerate(rows):
        if delta.finish_reason is not None:
            end = batch.ends.add(
                row=row,
                finish_reason=_FINISH_TO_PROTO[delta.finish_reason],
                cumulative_logprob=delta.cumulative_logprob,
            )
            _set_stop_reason(end, delta.stop_reason)
        if delta.logprobs or delta.prompt_logprobs:
            batch.logprobs.add(
                row=row,
                tokens=_logprobs_to_proto(delta.logprobs),
                prompt=_logprobs_to_proto(delta.prompt_logprobs),
            )
    return batch


def delta_batch_from_proto(
    batch: scheduler_pb2.DeltaBatch,
) -> tuple[list[tuple[int, ChoiceDelta]], list[tuple[int, TriviumError]]]:
    """Inverse of `delta_batch_to_proto`. Raises ColumnError."""
    handles, indices = columns.unpack(batch.handles), columns.unpack(batch.indices)
    ids = columns.unpack_ragged(batch.counts, batch.token_ids)
    columns.check_same_length(handles=handles, indices=indices, counts=ids, texts=batch.texts)
    ends = {end.row: end for end in batch.ends}
    logprobs = {item.row: item for item in batch.logprobs}
    if any(row >= len(handles) for row in (*ends, *logprobs)):
        raise columns.ColumnError(f"an end or logprobs name a row outside the {len(handles)} rows")
    no_logprobs = scheduler_pb2.RowLogprobs()
    rows = []
    for row, (handle, index, row_ids, text) in enumerate(zip(handles, indices, ids, batch.texts, strict=True)):
        end = ends.get(row)
        delta = ChoiceDelta(
            index=index,
            token_ids=row_ids,
            text=text,
            finish_reason=None if end is None else _FINISH_FROM_PROTO.get(end.finish_reason),
            stop_reason=None if end is None else _get_stop_reason(end),
            logprobs=_logprobs_from_proto(logprobs.get(row, no_logprobs).tokens),
            prompt_logprobs=_logprobs_from_proto(logprobs.get(row, no_logprobs).prompt),
            cumulative_logprob=None
            if end is None or not end.HasField("cumulative_logprob")
            else end.cumulative_logprob,
        )
        rows.append((handle, delta))
    return rows, [(item.handle, error_from_proto(item.error)) for item in batch.errors]


def error_to_proto(error: TriviumError) -> types_pb2.ErrorInfo:
    return types_pb2.ErrorInfo(status=error.grpc_status, code=error.code, message=error.message, param=error.param)


def error_from_proto(message: types_pb2.ErrorInfo) -> TriviumError:
    param = message.param if message.HasField("param") else None
    return error_from_status(message.status, message.message, param=param, code=message.code)


def plan_to_proto(plan: SchedulerOutput) -> executor_pb2.StepPlan:
    grown_counts, grown_block_ids = columns.pack_ragged(plan.new_blocks.block_ids)
    return executor_pb2.StepPlan(
        step=plan.step,
        scheduled_slots=columns.pack(plan.scheduled_slots),
        num_scheduled_tokens=columns.pack(plan.num_scheduled_tokens),
        new_requests=[_slot_init_to_proto(new) for new in plan.new_requests],
        grown_slots=columns.pack(plan.new_blocks.slots),
        grown_counts=grown_counts,
        grown_block_ids=grown_block_ids,
        encoder_slots=columns.pack(plan.encoder_slots),
        freed_slots=columns.pack(plan.freed_slots),
        copied_blocks=columns.pack_pairs(plan.copied_blocks),
        swapped_out=columns.pack_pairs(plan.swapped_out),
        swapped_in=columns.pack_pairs(plan.swapped_in),
    )


def plan_from_proto(message: executor_pb2.StepPlan) -> SchedulerOutput:
    """Inverse of `plan_to_proto`. Raises ColumnError."""
    scheduled, counts = columns.unpack(message.scheduled_slots), columns.unpack(message.num_scheduled_tokens)
    columns.check_same_length(scheduled_slots=scheduled, num_scheduled_tokens=counts)
    grown = columns.unpack(message.grown_slots)
    grown_ids = columns.unpack_ragged(message.grown_counts, message.grown_block_ids)
    columns.check_same_length(grown_slots=grown, grown_counts=grown_ids)
    return SchedulerOutput(
        step=message.step,
        scheduled_slots=tuple(scheduled),
        num_scheduled_tokens=tuple(counts),
        new_requests=tuple(_slot_init_from_proto(new) for new in message.new_requests),
        new_blocks=CachedRequestData(slots=tuple(grown), block_ids=tuple(grown_ids)),
        encoder_slots=tuple(columns.unpack(message.encoder_slots)),
        freed_slots=tuple(columns.unpack(message.freed_slots)),
        copied_blocks=columns.unpack_pairs(message.copied_blocks),
        swapped_out=columns.unpack_pairs(message.swapped_out),
        swapped_in=columns.unpack_pairs(message.swapped_in),
    )


def result_to_proto(output: ModelRunnerOutput, executor_epoch: int) -> executor_pb2.StepResult:
    return executor_pb2.StepResult(
        step=output.step,
        executor_epoch=executor_epoch,
        slots=columns.pack(output.slots),
        token_ids=columns.pack(output.token_ids),
        logprobs=[_slot_logprobs_to_proto(item) for item in output.logprobs],
        beams=[_candidates_to_proto(item) for item in output.beams],
        runs=[executor_pb2.TokenRun(slot=run.slot, token_ids=columns.pack(run.token_ids)) for run in output.runs],
        failures=[executor_pb2.SlotFailure(slot=item.slot, message=item.message) for item in output.failures],
    )


def result_from_proto(message: executor_pb2.StepResult) -> ModelRunnerOutput:
    """Inverse of `result_to_proto`. Raises ColumnError."""
    slots, token_ids = columns.unpack(message.slots), columns.unpack(message.token_ids)
    columns.check_same_length(slots=slots, token_ids=token_ids)
    return ModelRunnerOutput(
        step=message.step,
        slots=tuple(slots),
        token_ids=tuple(token_ids),
        logprobs=tuple(_slot_logprobs_from_proto(item) for item in message.logprobs),
        beams=tuple(_candidates_from_proto(item) for item in message.beams),
        runs=tuple(TokenRun(run.slot, tuple(columns.unpack(run.token_ids))) for run in message.runs),
        failures=tuple(SlotFailure(item.slot, item.message) for item in message.failures),
    )


def _slot_logprobs_to_proto(item: SlotLogprobs) -> executor_pb2.SlotLogprobs:
    sampled = () if item.sampled is None else (item.sampled,)
    return executor_pb2.SlotLogprobs(
        slot=item.slot,
        sampled=next(iter(_logprobs_to_proto(sampled)), None),
        prompt_start=item.prompt_start,
        prompt=_logprobs_to_proto(item.prompt),
    )


def _slot_logprobs_from_proto(message: executor_pb2.SlotLogprobs) -> SlotLogprobs:
    sampled = _logprobs_from_proto([message.sampled])[0] if message.HasField("sampled") else None
    return SlotLogprobs(message.slot, sampled, message.prompt_start, _logprobs_from_proto(message.prompt))


def _candidates_to_proto(item: BeamCandidates) -> executor_pb2.BeamCandidates:
    return executor_pb2.BeamCandidates(
        slot=item.slot,
        scores=columns.pack_floats(item.scores),
        beams=columns.pack(item.beams),
        token_ids=columns.pack(item.token_ids),
        logprobs=_logprobs_to_proto(item.logprobs),
    )


def _candidates_from_proto(message: executor_pb2.BeamCandidates) -> BeamCandidates:
    scores, beams = columns.unpack_floats(message.scores), columns.unpack(message.beams)
    token_ids, logprobs = columns.unpack(message.token_ids), _logprobs_from_proto(message.logprobs)
    columns.check_same_length(scores=scores, beams=beams, token_ids=token_ids, logprobs=logprobs or scores)
    return BeamCandidates(message.slot, scores, tuple(beams), tuple(token_ids), logprobs)


def _slot_init_to_proto(new: NewRequestData) -> executor_pb2.SlotInit:
    return executor_pb2.SlotInit(
        slot=new.slot,
        prompt_token_ids=columns.pack(new.prompt_token_ids),
        output_token_ids=columns.pack(new.output_token_ids),
        num_computed_tokens=new.num_computed_tokens,
        block_ids=columns.pack(new.block_ids),
        sampling=sampling_params_to_proto(new.sampling),
        choice_index=new.choice_index,
        max_tokens=new.max_tokens,
        encoder_token_ids=columns.pack(new.encoder_token_ids),
        cross_block_ids=columns.pack(new.cross_block_ids),
        beam_slots=columns.pack(new.beam_slots),
        adapter=new.adapter,
        prompt_embeds=new.prompt_embeds,
        encoder_embeds=new.encoder_embeds,
    )


def _slot_init_from_proto(message: executor_pb2.SlotInit) -> NewRequestData:
    return NewRequestData(
        slot=message.slot,
        prompt_token_ids=tuple(columns.unpack(message.prompt_token_ids)),
        output_token_ids=tuple(columns.unpack(message.output_token_ids)),
        num_computed_tokens=message.num_computed_tokens,
        block_ids=tuple(columns.unpack(message.block_ids)),
        sampling=sampling_params_from_proto(message.sampling),
        choice_index=message.choice_index,
        max_tokens=message.max_tokens,
        encoder_token_ids=tuple(columns.unpack(message.encoder_token_ids)),
        cross_block_ids=tuple(columns.unpack(message.cross_block_ids)),
        beam_slots=tuple(columns.unpack(message.beam_slots)),
        adapter=message.adapter,
        prompt_embeds=message.prompt_embeds if message.HasField("prompt_embeds") else None,
        encoder_embeds=message.encoder_embeds if message.HasField("encoder_embeds") else None,
    )


def _set_stop_reason(message: scheduler_pb2.ChoiceDelta | scheduler_pb2.RowEnd, reason: str | int | None) -> None:
    if isinstance(reason, str):
        message.stop_string = reason
    elif reason is not None:
        message.stop_token_id = reason


def _get_stop_reason(message: scheduler_pb2.ChoiceDelta | scheduler_pb2.RowEnd) -> str | int | None:
    kind = message.WhichOneof("stop_reason")
    return None if kind is None else getattr(message, kind)
