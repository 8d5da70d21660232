"""Facts about a model, and the defaults of its checkpoint."""

from __future__ import annotations

from typing import Any

from trivium.config import GenerationDefaults, ModelInfo, PromptAdapter
from trivium.v1 import types_pb2
from trivium.wire.sampling import EARLY_STOPPING_FROM_PROTO, EARLY_STOPPING_TO_PROTO

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
    "max_prompt_adapters",
    "hidden_size",
    "max_plans_in_flight",
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


def model_info_to_proto(info: ModelInfo) -> types_pb2.ModelInfo:
    optional = {name: getattr(info, name) for name in _INFO_OPTIONAL}
    return types_pb2.ModelInfo(
        **{name: getattr(info, name) for name in _INFO_SCALARS},
        **{name: value for name, value in optional.items() if value is not None},
        eos_token_ids=info.eos_token_ids,
        adapters=info.adapters,
        prompt_adapters=[
            types_pb2.PromptAdapter(
                name=adapter.name, num_virtual_tokens=adapter.num_virtual_tokens, of_encoder=adapter.of_encoder
            )
            for adapter in info.prompt_adapters
        ],
        generation_defaults=_defaults_to_proto(info.generation_defaults),
    )


def model_info_from_proto(message: types_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        **{name: getattr(message, name) for name in _INFO_SCALARS},
        **{name: getattr(message, name) if message.HasField(name) else None for name in _INFO_OPTIONAL},  # type: ignore[arg-type]
        eos_token_ids=tuple(message.eos_token_ids),
        adapters=tuple(message.adapters),
        prompt_adapters=tuple(
            PromptAdapter(adapter.name, adapter.num_virtual_tokens, adapter.of_encoder)
            for adapter in message.prompt_adapters
        ),
        generation_defaults=_defaults_from_proto(message.generation_defaults),
    )


def _defaults_to_proto(defaults: GenerationDefaults) -> types_pb2.GenerationDefaults:
    scalars = {name: getattr(defaults, name) for name in _DEFAULTS_SCALARS}
    early_stopping = defaults.early_stopping
    return types_pb2.GenerationDefaults(
        **{name: value for name, value in scalars.items() if value is not None},
        **{name: getattr(defaults, name) for name in _DEFAULTS_IDS},
        bad_words_ids=[types_pb2.TokenSequence(ids=ids) for ids in defaults.bad_words_ids],
        early_stopping=None if early_stopping is None else EARLY_STOPPING_TO_PROTO[early_stopping],
    )


def _defaults_from_proto(message: types_pb2.GenerationDefaults) -> GenerationDefaults:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _DEFAULTS_SCALARS if message.HasField(name)}
    fields |= {name: tuple(getattr(message, name)) for name in _DEFAULTS_IDS}
    if message.HasField("early_stopping"):
        fields["early_stopping"] = EARLY_STOPPING_FROM_PROTO[message.early_stopping]
    return GenerationDefaults(**fields, bad_words_ids=tuple(tuple(item.ids) for item in message.bad_words_ids))
