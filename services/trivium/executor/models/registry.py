"""Architecture name (as in config.json) -> how to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from trivium.errors import ConfigurationError
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models import bart_families, t5_families
from trivium.executor.models.bart import build_bart
from trivium.executor.models.llama import build_llama, build_mistral, build_qwen2, build_qwen3
from trivium.executor.models.model import LanguageModel
from trivium.executor.models.t5 import build_t5
from trivium_kernels.dispatch import Kernels


@dataclass(frozen=True, slots=True)
class Architecture:
    """default_tokens: special token ids of the transformers class, for keys that a config.json may leave out."""

    name: str
    build: Callable[[JsonConfig, Checkpoint, Kernels], LanguageModel]
    default_tokens: Mapping[str, int]


_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_BART_TOKENS = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_MBART_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
_MARIAN_TOKENS = {
    "pad_token_id": 58100,
    "eos_token_id": 0,
    "decoder_start_token_id": 58100,
    "forced_eos_token_id": 0,
}
_PEGASUS_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
_M2M100_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_BLENDERBOT_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_T5_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def _bart(name: str, family: bart_families.BartFamily, default_tokens: Mapping[str, int]) -> Architecture:
    return Architecture(name, partial(build_bart, family), default_tokens)


def _t5(name: str, family: t5_families.T5Family) -> Architecture:
    return Architecture(name, partial(build_t5, family), _T5_TOKENS)


ARCHITECTURES = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            Architecture("LlamaForCausalLM", build_llama, _LLAMA_TOKENS),
            Architecture("MistralForCausalLM", build_mistral, _LLAMA_TOKENS),
            Architecture("Qwen2ForCausalLM", build_qwen2, {}),
            Architecture("Qwen3ForCausalLM", build_qwen3, {}),
            _bart("BartForConditionalGeneration", bart_families.BART, _BART_TOKENS),
            _bart("MBartForConditionalGeneration", bart_families.MBART, _MBART_TOKENS),
            _bart("MarianMTModel", bart_families.MARIAN, _MARIAN_TOKENS),
            _bart("PegasusForConditionalGeneration", bart_families.PEGASUS, _PEGASUS_TOKENS),
            _bart("M2M100ForConditionalGeneration", bart_families.M2M100, _M2M100_TOKENS),
            _bart("BlenderbotForConditionalGeneration", bart_families.BLENDERBOT, _BLENDERBOT_TOKENS),
            _bart("BlenderbotSmallForConditionalGeneration", bart_families.BLENDERBOT_SMALL, _BLENDERBOT_TOKENS),
            _t5("T5ForConditionalGeneration", t5_families.T5),
            _t5("MT5ForConditionalGeneration", t5_families.MT5),
            _t5("UMT5ForConditionalGeneration", t5_families.UMT5),
        )
    }
)


def find_architecture(config: JsonConfig) -> Architecture:
    """The architecture that config.json names. Raises ConfigurationError listing what is supported."""
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigurationError(f"{config.file}: architectures is missing")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ConfigurationError(
        f"{config.file}: architecture {names[0]!r:.60} is not supported: {', '.join(ARCHITECTURES)}"
    )
