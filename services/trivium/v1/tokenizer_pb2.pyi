from trivium.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("model", "texts", "add_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    add_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., add_special_tokens: bool = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokensPrompt]
    def __init__(self, outputs: _Optional[_Iterable[_Union[_types_pb2.TokensPrompt, _Mapping]]] = ...) -> None: ...

class EncodePairRequest(_message.Message):
    __slots__ = ("model", "encoder_text", "decoder_text", "source_language", "target_language")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENCODER_TEXT_FIELD_NUMBER: _ClassVar[int]
    DECODER_TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    model: str
    encoder_text: str
    decoder_text: str
    source_language: str
    target_language: str
    def __init__(self, model: _Optional[str] = ..., encoder_text: _Optional[str] = ..., decoder_text: _Optional[str] = ..., source_language: _Optional[str] = ..., target_language: _Optional[str] = ...) -> None: ...

class EncodePairResponse(_message.Message):
    __slots__ = ("encoder", "decoder", "decoder_prefix", "decoder_start_token_id", "forced_bos_token_id", "needs_target_language")
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    DECODER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DECODER_START_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FORCED_BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NEEDS_TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    encoder: _types_pb2.TokensPrompt
    decoder: _types_pb2.TokensPrompt
    decoder_prefix: _types_pb2.TokensPrompt
    decoder_start_token_id: int
    forced_bos_token_id: int
    needs_target_language: bool
    def __init__(self, encoder: _Optional[_Union[_types_pb2.TokensPrompt, _Mapping]] = ..., decoder: _Optional[_Union[_types_pb2.TokensPrompt, _Mapping]] = ..., decoder_prefix: _Optional[_Union[_types_pb2.TokensPrompt, _Mapping]] = ..., decoder_start_token_id: _Optional[int] = ..., forced_bos_token_id: _Optional[int] = ..., needs_target_language: bool = ...) -> None: ...

class RenderRequest(_message.Message):
    __slots__ = ("model", "messages_json", "tools_json", "add_generation_prompt", "continue_final_message", "template_kwargs_json")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_KWARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages_json: bytes
    tools_json: bytes
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs_json: bytes
    def __init__(self, model: _Optional[str] = ..., messages_json: _Optional[bytes] = ..., tools_json: _Optional[bytes] = ..., add_generation_prompt: bool = ..., continue_final_message: bool = ..., template_kwargs_json: _Optional[bytes] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("prompt", "embeds")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    prompt: _types_pb2.TokensPrompt
    embeds: _containers.RepeatedCompositeFieldContainer[EmbedsMark]
    def __init__(self, prompt: _Optional[_Union[_types_pb2.TokensPrompt, _Mapping]] = ..., embeds: _Optional[_Iterable[_Union[EmbedsMark, _Mapping]]] = ...) -> None: ...

class EmbedsMark(_message.Message):
    __slots__ = ("position", "number")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    position: int
    number: int
    def __init__(self, position: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class GetTokensRequest(_message.Message):
    __slots__ = ("model", "ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GetTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenText]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenText, _Mapping]]] = ...) -> None: ...

class TokenText(_message.Message):
    __slots__ = ("text", "raw", "is_special")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    IS_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    text: str
    raw: bytes
    is_special: bool
    def __init__(self, text: _Optional[str] = ..., raw: _Optional[bytes] = ..., is_special: bool = ...) -> None: ...

class CheckGrammarRequest(_message.Message):
    __slots__ = ("model", "structured_outputs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    structured_outputs: _types_pb2.StructuredOutputs
    def __init__(self, model: _Optional[str] = ..., structured_outputs: _Optional[_Union[_types_pb2.StructuredOutputs, _Mapping]] = ...) -> None: ...

class CheckGrammarResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("model", "ids", "skip_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., skip_special_tokens: bool = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class DetokenizeCommand(_message.Message):
    __slots__ = ("hello", "push")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    hello: DetokenizeHello
    push: DetokenizePush
    def __init__(self, hello: _Optional[_Union[DetokenizeHello, _Mapping]] = ..., push: _Optional[_Union[DetokenizePush, _Mapping]] = ...) -> None: ...

class DetokenizeHello(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DetokenizeOpen(_message.Message):
    __slots__ = ("handle", "skip_special_tokens", "stop", "include_stop_str_in_output", "replay_ids", "emitted_chars")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REPLAY_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_CHARS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    skip_special_tokens: bool
    stop: _containers.RepeatedScalarFieldContainer[str]
    include_stop_str_in_output: bool
    replay_ids: bytes
    emitted_chars: int
    def __init__(self, handle: _Optional[int] = ..., skip_special_tokens: bool = ..., stop: _Optional[_Iterable[str]] = ..., include_stop_str_in_output: bool = ..., replay_ids: _Optional[bytes] = ..., emitted_chars: _Optional[int] = ...) -> None: ...

class DetokenizePush(_message.Message):
    __slots__ = ("sequence", "opens", "handles", "counts", "ids", "final", "closed_handles")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OPENS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    CLOSED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    opens: _containers.RepeatedCompositeFieldContainer[DetokenizeOpen]
    handles: bytes
    counts: bytes
    ids: bytes
    final: bytes
    closed_handles: bytes
    def __init__(self, sequence: _Optional[int] = ..., opens: _Optional[_Iterable[_Union[DetokenizeOpen, _Mapping]]] = ..., handles: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., final: _Optional[bytes] = ..., closed_handles: _Optional[bytes] = ...) -> None: ...

class DetokenizeEvent(_message.Message):
    __slots__ = ("welcome", "text")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    welcome: DetokenizeWelcome
    text: DetokenizeText
    def __init__(self, welcome: _Optional[_Union[DetokenizeWelcome, _Mapping]] = ..., text: _Optional[_Union[DetokenizeText, _Mapping]] = ...) -> None: ...

class DetokenizeWelcome(_message.Message):
    __slots__ = ("tokenizer_epoch",)
    TOKENIZER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    tokenizer_epoch: int
    def __init__(self, tokenizer_epoch: _Optional[int] = ...) -> None: ...

class DetokenizeText(_message.Message):
    __slots__ = ("sequence", "texts", "stops")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    STOPS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    texts: _containers.RepeatedScalarFieldContainer[str]
    stops: _containers.RepeatedCompositeFieldContainer[StopHit]
    def __init__(self, sequence: _Optional[int] = ..., texts: _Optional[_Iterable[str]] = ..., stops: _Optional[_Iterable[_Union[StopHit, _Mapping]]] = ...) -> None: ...

class StopHit(_message.Message):
    __slots__ = ("row", "stop_index", "tokens_kept")
    ROW_FIELD_NUMBER: _ClassVar[int]
    STOP_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_KEPT_FIELD_NUMBER: _ClassVar[int]
    row: int
    stop_index: int
    tokens_kept: int
    def __init__(self, row: _Optional[int] = ..., stop_index: _Optional[int] = ..., tokens_kept: _Optional[int] = ...) -> None: ...
