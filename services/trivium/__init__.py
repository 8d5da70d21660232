"""Trivium: a language-model server of four processes, and the same engine in one process.

Public names resolve on first use, so that importing `trivium` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trivium.adapters import LoRARequest, PromptAdapterRequest
    from trivium.async_llm import AsyncLLM
    from trivium.beam_params import BeamSearchParams
    from trivium.chat_utils import load_chat_template
    from trivium.engine_args import EngineArgs
    from trivium.guided import GuidedDecodingRequest, LLMGuidedOptions
    from trivium.inputs import (
        EmbedsPrompt,
        ExplicitEncoderDecoderPrompt,
        MixedPrompt,
        TextPrompt,
        TokensPrompt,
        build_explicit_enc_dec_prompt,
        to_enc_dec_tuple_list,
        zip_enc_dec_prompt_lists,
        zip_enc_dec_prompts,
    )
    from trivium.llm import LLM
    from trivium.outputs import CompletionOutput, Logprob, RequestOutput
    from trivium.params import RequestOutputKind, SamplingParams
    from trivium.pooling import PoolingParams
    from trivium.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbedsPrompt",
    "EngineArgs",
    "ExplicitEncoderDecoderPrompt",
    "GuidedDecodingRequest",
    "LLMGuidedOptions",
    "LoRARequest",
    "Logprob",
    "MixedPrompt",
    "PoolingParams",
    "PromptAdapterRequest",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "build_explicit_enc_dec_prompt",
    "load_chat_template",
    "to_enc_dec_tuple_list",
    "zip_enc_dec_prompt_lists",
    "zip_enc_dec_prompts",
]

_HOME = {
    "LLM": "trivium.llm",
    "AsyncLLM": "trivium.async_llm",
    "BeamSearchParams": "trivium.beam_params",
    "CompletionOutput": "trivium.outputs",
    "EmbedsPrompt": "trivium.inputs",
    "EngineArgs": "trivium.engine_args",
    "ExplicitEncoderDecoderPrompt": "trivium.inputs",
    "GuidedDecodingRequest": "trivium.guided",
    "LLMGuidedOptions": "trivium.guided",
    "LoRARequest": "trivium.adapters",
    "Logprob": "trivium.outputs",
    "MixedPrompt": "trivium.inputs",
    "PoolingParams": "trivium.pooling",
    "PromptAdapterRequest": "trivium.adapters",
    "RequestOutput": "trivium.outputs",
    "RequestOutputKind": "trivium.params",
    "SamplingParams": "trivium.params",
    "StructuredOutputsParams": "trivium.structured_outputs",
    "TextPrompt": "trivium.inputs",
    "TokensPrompt": "trivium.inputs",
    "build_explicit_enc_dec_prompt": "trivium.inputs",
    "load_chat_template": "trivium.chat_utils",
    "to_enc_dec_tuple_list": "trivium.inputs",
    "zip_enc_dec_prompt_lists": "trivium.inputs",
    "zip_enc_dec_prompts": "trivium.inputs",
}


_NEED_TORCH = ("LLM", "AsyncLLM")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    if name in _NEED_TORCH and "torch" not in sys.modules:
        importlib.import_module("trivium.process").wait_passively()
    return getattr(importlib.import_module(_HOME[name]), name)
