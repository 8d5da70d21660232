"""Requests to a scheduler, and what comes back: deltas, ends, errors."""

from __future__ import annotations

from trivium import columns
from trivium.errors import TriviumError, error_from_status
from trivium.inputs import GenerationRequest, ResumedChoice
from trivium.outputs import ChoiceDelta, FinishReason
from trivium.v1 import scheduler_pb2, types_pb2
from trivium.wire.logprobs import logprobs_from_proto, logprobs_to_proto
from trivium.wire.prompts import encoded_prompt_to_prompt, prompt_to_proto
from trivium.wire.sampling import sampling_params_to_proto

_FINISH_TO_PROTO: dict[FinishReason, types_pb2.FinishReason] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
}

_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}


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
        prompt_adapter=request.prompt_adapter,
        sampling_is_complete=True,
    )


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


def delta_to_proto(delta: ChoiceDelta) -> scheduler_pb2.ChoiceDelta:
    message = scheduler_pb2.ChoiceDelta(
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=logprobs_to_proto(delta.logprobs),
        prompt_logprobs=logprobs_to_proto(delta.prompt_logprobs),
        cumulative_logprob=delta.cumulative_logprob,
        num_cached_tokens=delta.num_cached_tokens,
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
        logprobs=logprobs_from_proto(message.logprobs),
        prompt_logprobs=logprobs_from_proto(message.prompt_logprobs),
        cumulative_logprob=message.cumulative_logprob if message.HasField("cumulative_logprob") else None,
        num_cached_tokens=message.num_cached_tokens if message.HasField("num_cached_tokens") else None,
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
        if delta.num_cached_tokens is not None:
            batch.starts.add(row=row, num_cached_tokens=delta.num_cached_tokens)
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
                tokens=logprobs_to_proto(delta.logprobs),
                prompt=logprobs_to_proto(delta.prompt_logprobs),
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
    num_cached = {start.row: start.num_cached_tokens for start in batch.starts}
    if any(row >= len(handles) for row in (*ends, *logprobs, *num_cached)):
        raise columns.ColumnError(f"a start, an end or logprobs name a row outside the {len(handles)} rows")
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
            logprobs=logprobs_from_proto(logprobs.get(row, no_logprobs).tokens),
            prompt_logprobs=logprobs_from_proto(logprobs.get(row, no_logprobs).prompt),
            cumulative_logprob=None
            if end is None or not end.HasField("cumulative_logprob")
            else end.cumulative_logprob,
            num_cached_tokens=num_cached.get(row),
        )
        rows.append((handle, delta))
    return rows, [(item.handle, error_from_proto(item.error)) for item in batch.errors]


def error_to_proto(error: TriviumError) -> types_pb2.ErrorInfo:
    return types_pb2.ErrorInfo(status=error.grpc_status, code=error.code, message=error.message, param=error.param)


def error_from_proto(message: types_pb2.ErrorInfo) -> TriviumError:
    param = message.param if message.HasField("param") else None
    return error_from_status(message.status, message.message, param=param, code=message.code)


def _set_stop_reason(message: scheduler_pb2.ChoiceDelta | scheduler_pb2.RowEnd, reason: str | int | None) -> None:
    if isinstance(reason, str):
        message.stop_string = reason
    elif reason is not None:
        message.stop_token_id = reason


def _get_stop_reason(message: scheduler_pb2.ChoiceDelta | scheduler_pb2.RowEnd) -> str | int | None:
    kind = message.WhichOneof("stop_reason")
    return None if kind is None else getattr(message, kind)
