from trivium.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExecuteCommand(_message.Message):
    __slots__ = ("hello", "plan", "grammar")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    hello: ExecuteHello
    plan: StepPlan
    grammar: CompileGrammar
    def __init__(self, hello: _Optional[_Union[ExecuteHello, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., grammar: _Optional[_Union[CompileGrammar, _Mapping]] = ...) -> None: ...

class ExecuteEvent(_message.Message):
    __slots__ = ("welcome", "result", "heartbeat", "grammar")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    welcome: ExecuteWelcome
    result: StepResult
    heartbeat: ExecuteHeartbeat
    grammar: GrammarCompiled
    def __init__(self, welcome: _Optional[_Union[ExecuteWelcome, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., heartbeat: _Optional[_Union[ExecuteHeartbeat, _Mapping]] = ..., grammar: _Optional[_Union[GrammarCompiled, _Mapping]] = ...) -> None: ...

class ExecuteHello(_message.Message):
    __slots__ = ("scheduler_epoch", "protocol_revision")
    SCHEDULER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    scheduler_epoch: int
    protocol_revision: int
    def __init__(self, scheduler_epoch: _Optional[int] = ..., protocol_revision: _Optional[int] = ...) -> None: ...

class ExecuteWelcome(_message.Message):
    __slots__ = ("executor_epoch", "model")
    EXECUTOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    executor_epoch: int
    model: _types_pb2.ModelInfo
    def __init__(self, executor_epoch: _Optional[int] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ...) -> None: ...

class CompileGrammar(_message.Message):
    __slots__ = ("key", "structured_outputs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    key: int
    structured_outputs: _types_pb2.StructuredOutputs
    def __init__(self, key: _Optional[int] = ..., structured_outputs: _Optional[_Union[_types_pb2.StructuredOutputs, _Mapping]] = ...) -> None: ...

class GrammarCompiled(_message.Message):
    __slots__ = ("key", "error")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    key: int
    error: _types_pb2.ErrorInfo
    def __init__(self, key: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.ErrorInfo, _Mapping]] = ...) -> None: ...

class ExecuteHeartbeat(_message.Message):
    __slots__ = ("last_step_done",)
    LAST_STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    last_step_done: int
    def __init__(self, last_step_done: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "scheduled_slots", "num_scheduled_tokens", "new_requests", "grown_slots", "grown_counts", "grown_block_ids", "encoder_slots", "freed_slots", "copied_blocks", "swapped_out", "swapped_in")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCHEDULED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    GROWN_SLOTS_FIELD_NUMBER: _ClassVar[int]
    GROWN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GROWN_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    COPIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_OUT_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_IN_FIELD_NUMBER: _ClassVar[int]
    step: int
    scheduled_slots: bytes
    num_scheduled_tokens: bytes
    new_requests: _containers.RepeatedCompositeFieldContainer[SlotInit]
    grown_slots: bytes
    grown_counts: bytes
    grown_block_ids: bytes
    encoder_slots: bytes
    freed_slots: bytes
    copied_blocks: bytes
    swapped_out: bytes
    swapped_in: bytes
    def __init__(self, step: _Optional[int] = ..., scheduled_slots: _Optional[bytes] = ..., num_scheduled_tokens: _Optional[bytes] = ..., new_requests: _Optional[_Iterable[_Union[SlotInit, _Mapping]]] = ..., grown_slots: _Optional[bytes] = ..., grown_counts: _Optional[bytes] = ..., grown_block_ids: _Optional[bytes] = ..., encoder_slots: _Optional[bytes] = ..., freed_slots: _Optional[bytes] = ..., copied_blocks: _Optional[bytes] = ..., swapped_out: _Optional[bytes] = ..., swapped_in: _Optional[bytes] = ...) -> None: ...

class SlotInit(_message.Message):
    __slots__ = ("slot", "prompt_token_ids", "output_token_ids", "num_computed_tokens", "block_ids", "sampling", "choice_index", "max_tokens", "encoder_token_ids", "cross_block_ids", "beam_slots", "adapter", "prompt_embeds", "encoder_embeds", "prompt_places", "encoder_places", "prompt_adapter")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CROSS_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BEAM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PLACES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_PLACES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    slot: int
    prompt_token_ids: bytes
    output_token_ids: bytes
    num_computed_tokens: int
    block_ids: bytes
    sampling: _types_pb2.SamplingParams
    choice_index: int
    max_tokens: int
    encoder_token_ids: bytes
    cross_block_ids: bytes
    beam_slots: bytes
    adapter: str
    prompt_embeds: bytes
    encoder_embeds: bytes
    prompt_places: bytes
    encoder_places: bytes
    prompt_adapter: str
    def __init__(self, slot: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., output_token_ids: _Optional[bytes] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., choice_index: _Optional[int] = ..., max_tokens: _Optional[int] = ..., encoder_token_ids: _Optional[bytes] = ..., cross_block_ids: _Optional[bytes] = ..., beam_slots: _Optional[bytes] = ..., adapter: _Optional[str] = ..., prompt_embeds: _Optional[bytes] = ..., encoder_embeds: _Optional[bytes] = ..., prompt_places: _Optional[bytes] = ..., encoder_places: _Optional[bytes] = ..., prompt_adapter: _Optional[str] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "executor_epoch", "slots", "token_ids", "logprobs", "beams", "runs", "failures")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    step: int
    executor_epoch: int
    slots: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[SlotLogprobs]
    beams: _containers.RepeatedCompositeFieldContainer[BeamCandidates]
    runs: _containers.RepeatedCompositeFieldContainer[TokenRun]
    failures: _containers.RepeatedCompositeFieldContainer[SlotFailure]
    def __init__(self, step: _Optional[int] = ..., executor_epoch: _Optional[int] = ..., slots: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[SlotLogprobs, _Mapping]]] = ..., beams: _Optional[_Iterable[_Union[BeamCandidates, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[TokenRun, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[SlotFailure, _Mapping]]] = ...) -> None: ...

class TokenRun(_message.Message):
    __slots__ = ("slot", "token_ids")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: bytes
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

class SlotFailure(_message.Message):
    __slots__ = ("slot", "message")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    message: str
    def __init__(self, slot: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class SlotLogprobs(_message.Message):
    __slots__ = ("slot", "sampled", "prompt_start", "prompt")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_START_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    sampled: _types_pb2.TokenLogprobs
    prompt_start: int
    prompt: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    def __init__(self, slot: _Optional[int] = ..., sampled: _Optional[_Union[_types_pb2.TokenLogprobs, _Mapping]] = ..., prompt_start: _Optional[int] = ..., prompt: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class BeamCandidates(_message.Message):
    __slots__ = ("slot", "scores", "beams", "token_ids", "logprobs", "stops")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOPS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    scores: bytes
    beams: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    stops: bytes
    def __init__(self, slot: _Optional[int] = ..., scores: _Optional[bytes] = ..., beams: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ..., stops: _Optional[bytes] = ...) -> None: ...
