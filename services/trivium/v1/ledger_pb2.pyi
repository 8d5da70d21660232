from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetLedgerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LedgerReply(_message.Message):
    __slots__ = ("service", "epoch", "uptime_s", "open_streams", "asyncio_tasks", "threads", "open_file_descriptors", "resident_memory_bytes", "scheduler", "executor", "tokenizer", "peers")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    OPEN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    ASYNCIO_TASKS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FILE_DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    service: str
    epoch: int
    uptime_s: float
    open_streams: int
    asyncio_tasks: int
    threads: int
    open_file_descriptors: int
    resident_memory_bytes: int
    scheduler: SchedulerLedger
    executor: ExecutorLedger
    tokenizer: TokenizerLedger
    peers: _containers.RepeatedCompositeFieldContainer[LedgerReply]
    def __init__(self, service: _Optional[str] = ..., epoch: _Optional[int] = ..., uptime_s: _Optional[float] = ..., open_streams: _Optional[int] = ..., asyncio_tasks: _Optional[int] = ..., threads: _Optional[int] = ..., open_file_descriptors: _Optional[int] = ..., resident_memory_bytes: _Optional[int] = ..., scheduler: _Optional[_Union[SchedulerLedger, _Mapping]] = ..., executor: _Optional[_Union[ExecutorLedger, _Mapping]] = ..., tokenizer: _Optional[_Union[TokenizerLedger, _Mapping]] = ..., peers: _Optional[_Iterable[_Union[LedgerReply, _Mapping]]] = ...) -> None: ...

class SchedulerLedger(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "waiting_tokens", "blocks_total", "blocks_free", "blocks_held", "blocks_cached", "blocks_cross", "preemptions", "prefix_tokens_queried", "prefix_tokens_hit", "sessions", "host_blocks_total", "host_blocks_free", "swapped_requests", "swaps")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CROSS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_QUERIED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_HIT_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SWAPS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    waiting_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_held: int
    blocks_cached: int
    blocks_cross: int
    preemptions: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int
    sessions: int
    host_blocks_total: int
    host_blocks_free: int
    swapped_requests: int
    swaps: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_held: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_cross: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_tokens_queried: _Optional[int] = ..., prefix_tokens_hit: _Optional[int] = ..., sessions: _Optional[int] = ..., host_blocks_total: _Optional[int] = ..., host_blocks_free: _Optional[int] = ..., swapped_requests: _Optional[int] = ..., swaps: _Optional[int] = ...) -> None: ...

class ExecutorLedger(_message.Message):
    __slots__ = ("occupied_slots", "steps_done", "kv_pool_bytes")
    OCCUPIED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    KV_POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    occupied_slots: int
    steps_done: int
    kv_pool_bytes: int
    def __init__(self, occupied_slots: _Optional[int] = ..., steps_done: _Optional[int] = ..., kv_pool_bytes: _Optional[int] = ...) -> None: ...

class TokenizerLedger(_message.Message):
    __slots__ = ("detokenize_handles", "models")
    DETOKENIZE_HANDLES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    detokenize_handles: int
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, detokenize_handles: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...
