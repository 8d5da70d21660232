"""Trivium: a language-model server of four processes, and the same engine in one process.

Public names resolve on first use, so that importing `trivium` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trivium.beam_params import BeamSearchParams
    from trivium.inputs import (
        EmbedsPrompt,
        ExplicitEncoderDecoderPrompt,
        LoRARequest,
        TextPrompt,
        TokensPrompt,
        zip_enc_dec_prompt_lists,
    )
    from trivium.llm import LLM
    from trivium.outputs import CompletionOutput, Logprob, RequestOutput
    from trivium.params import SamplingParams
    from trivium.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbedsPrompt",
    "ExplicitEncoderDecoderPrompt",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "zip_enc_dec_prompt_lists",
]

_HOME = {
    "LLM": "trivium.llm",
    "BeamSearchParams": "trivium.beam_params",
    "CompletionOutput": "trivium.outputs",
    "EmbedsPrompt": "trivium.inputs",
    "ExplicitEncoderDecoderPrompt": "trivium.inputs",
    "LoRARequest": "trivium.inputs",
    "Logprob": "trivium.outputs",
    "RequestOutput": "trivium.outputs",
    "SamplingParams": "trivium.params",
    "StructuredOutputsParams": "trivium.structured_outputs",
    "TextPrompt": "trivium.inputs",
    "TokensPrompt": "trivium.inputs",
    "zip_enc_dec_prompt_lists": "trivium.inputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
