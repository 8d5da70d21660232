from trivium.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "sampling", "stream", "resume", "traceparent", "priority", "tenant", "cache_salt", "sampling_is_complete", "adapter", "prompt_adapter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: _types_pb2.Prompt
    sampling: _types_pb2.SamplingParams
    stream: bool
    resume: _containers.RepeatedCompositeFieldContainer[ResumedChoice]
    traceparent: str
    priority: int
    tenant: str
    cache_salt: str
    sampling_is_complete: bool
    adapter: str
    prompt_adapter: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[_types_pb2.Prompt, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., stream: bool = ..., resume: _Optional[_Iterable[_Union[ResumedChoice, _Mapping]]] = ..., traceparent: _Optional[str] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., cache_salt: _Optional[str] = ..., sampling_is_complete: bool = ..., adapter: _Optional[str] = ..., prompt_adapter: _Optional[str] = ...) -> None: ...

class ResumedChoice(_message.Message):
    __slots__ = ("index", "output_token_ids", "emitted_chars", "finished")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_CHARS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    index: int
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_chars: int
    finished: bool
    def __init__(self, index: _Optional[int] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., emitted_chars: _Optional[int] = ..., finished: bool = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "delta")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    delta: ChoiceDelta
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., delta: _Optional[_Union[ChoiceDelta, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("prompt_token_ids", "encoder_prompt_token_ids", "scheduler_epoch")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    encoder_prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    scheduler_epoch: int
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., encoder_prompt_token_ids: _Optional[_Iterable[int]] = ..., scheduler_epoch: _Optional[int] = ...) -> None: ...

class ChoiceDelta(_message.Message):
    __slots__ = ("index", "token_ids", "text", "finish_reason", "stop_token_id", "stop_string", "logprobs", "prompt_logprobs", "cumulative_logprob", "num_cached_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CUMULATIVE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: _types_pb2.FinishReason
    stop_token_id: int
    stop_string: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    cumulative_logprob: float
    num_cached_tokens: int
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ..., cumulative_logprob: _Optional[float] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class SessionCommand(_message.Message):
    __slots__ = ("hello", "submit", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    submit: Submit
    cancel: Cancel
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("client_epoch", "protocol_revision")
    CLIENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    client_epoch: int
    protocol_revision: int
    def __init__(self, client_epoch: _Optional[int] = ..., protocol_revision: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request: GenerateRequest
    def __init__(self, handle: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("welcome", "batch", "heartbeat")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: SessionWelcome
    batch: DeltaBatch
    heartbeat: Heartbeat
    def __init__(self, welcome: _Optional[_Union[SessionWelcome, _Mapping]] = ..., batch: _Optional[_Union[DeltaBatch, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class SessionWelcome(_message.Message):
    __slots__ = ("scheduler_epoch", "model")
    SCHEDULER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    scheduler_epoch: int
    model: _types_pb2.ModelInfo
    def __init__(self, scheduler_epoch: _Optional[int] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("scheduler_epoch",)
    SCHEDULER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    scheduler_epoch: int
    def __init__(self, scheduler_epoch: _Optional[int] = ...) -> None: ...

class DeltaBatch(_message.Message):
    __slots__ = ("handles", "indices", "counts", "token_ids", "texts", "ends", "errors", "logprobs", "starts")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    indices: bytes
    counts: bytes
    token_ids: bytes
    texts: _containers.RepeatedScalarFieldContainer[str]
    ends: _containers.RepeatedCompositeFieldContainer[RowEnd]
    errors: _containers.RepeatedCompositeFieldContainer[HandleError]
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    starts: _containers.RepeatedCompositeFieldContainer[RowStart]
    def __init__(self, handles: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., texts: _Optional[_Iterable[str]] = ..., ends: _Optional[_Iterable[_Union[RowEnd, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[HandleError, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ..., starts: _Optional[_Iterable[_Union[RowStart, _Mapping]]] = ...) -> None: ...

class RowStart(_message.Message):
    __slots__ = ("row", "num_cached_tokens")
    ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    row: int
    num_cached_tokens: int
    def __init__(self, row: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("row", "tokens", "prompt")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    row: int
    tokens: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    prompt: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    def __init__(self, row: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ..., prompt: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class RowEnd(_message.Message):
    __slots__ = ("row", "finish_reason", "stop_token_id", "stop_string", "cumulative_logprob")
    ROW_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    CUMULATIVE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    row: int
    finish_reason: _types_pb2.FinishReason
    stop_token_id: int
    stop_string: str
    cumulative_logprob: float
    def __init__(self, row: _Optional[int] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., cumulative_logprob: _Optional[float] = ...) -> None: ...

class HandleError(_message.Message):
    __slots__ = ("handle", "error")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    handle: int
    error: _types_pb2.ErrorInfo
    def __init__(self, handle: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.ErrorInfo, _Mapping]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
