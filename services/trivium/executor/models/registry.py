"""Architecture name (as in config.json) -> how to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from trivium.errors import ConfigurationError
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models import bart_families, decoder_families, gemma_families, older_decoder_families, t5_families
from trivium.executor.models.bart import build_bart
from trivium.executor.models.decoder import build_decoder
from trivium.executor.models.decoder_config import DecoderConfig
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
_GEMMA_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_PHI3_TOKENS = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
_OLMO2_TOKENS = {"pad_token_id": 1, "eos_token_id": 50279}
_SMOLLM3_TOKENS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}
_GPT2_TOKENS = {"bos_token_id": 50256, "eos_token_id": 50256}
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


def _decoder(name: str, read: Callable[[JsonConfig], DecoderConfig], default_tokens: Mapping[str, int]) -> Architecture:
    return Architecture(name, partial(build_decoder, read), default_tokens)


def _t5(name: str, family: t5_families.T5Family) -> Architecture:
    return Architecture(name, partial(build_t5, family), _T5_TOKENS)


ARCHITECTURES = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            _decoder("LlamaForCausalLM", decoder_families.read_llama, _LLAMA_TOKENS),
            _decoder("MistralForCausalLM", decoder_families.read_mistral, _LLAMA_TOKENS),
            _decoder("MixtralForCausalLM", decoder_families.read_mixtral, _LLAMA_TOKENS),
            _decoder("Qwen2ForCausalLM", decoder_families.read_qwen2, {}),
            _decoder("Qwen2MoeForCausalLM", decoder_families.read_qwen2_moe, {}),
            _decoder("Qwen3ForCausalLM", decoder_families.read_qwen3, {}),
            _decoder("Qwen3MoeForCausalLM", decoder_families.read_qwen3_moe, {}),
            _decoder("GemmaForCausalLM", gemma_families.read_gemma, _GEMMA_TOKENS),
            _decoder("Gemma2ForCausalLM", gemma_families.read_gemma2, _GEMMA_TOKENS),
            _decoder("Gemma3ForCausalLM", gemma_families.read_gemma3, _GEMMA_TOKENS),
            _decoder("Phi3ForCausalLM", decoder_families.read_phi3, _PHI3_TOKENS),
            _decoder("Olmo2ForCausalLM", decoder_families.read_olmo2, _OLMO2_TOKENS),
            _decoder("GraniteForCausalLM", decoder_families.read_granite, _LLAMA_TOKENS),
            _decoder("SmolLM3ForCausalLM", decoder_families.read_smollm3, _SMOLLM3_TOKENS),
            _decoder("Starcoder2ForCausalLM", decoder_families.read_starcoder2, _GPT2_TOKENS),
            _decoder("StableLmForCausalLM", decoder_families.read_stablelm, {"bos_token_id": 0, "eos_token_id": 0}),
            _decoder("GPT2LMHeadModel", older_decoder_families.read_gpt2, _GPT2_TOKENS),
            _decoder(
                "OPTForCausalLM",
                older_decoder_families.read_opt,
                {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
            ),
            _decoder(
                "GPTNeoXForCausalLM", older_decoder_families.read_gpt_neox, {"bos_token_id": 0, "eos_token_id": 2}
            ),
            _decoder("FalconForCausalLM", older_decoder_families.read_falcon, {"bos_token_id": 11, "eos_token_id": 11}),
            _bart("BartForConditionalGeneration", bart_families.BART, _BART_TOKENS),
            _bart("BartModel", bart_families.BART, _BART_TOKENS),  # what bart-base and bart-large call themselves
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
    """The architecture that config.json names, ours or else that of transformers.

    Raises ConfigurationError listing what is supported.
    """
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigurationError(f"{config.file}: architectures is missing")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    return _find_fallback(config, str(names[0]))


def _find_fallback(config: JsonConfig, name: str) -> Architecture:
    from trivium.executor.models.fallback import build_fallback, default_tokens

    tokens = default_tokens(name)
    if tokens is not None:
        return Architecture(name, partial(build_fallback, name), tokens)
    if "auto_map" in config.values:
        raise ConfigurationError(
            f"{config.file}: architecture {name!r:.60} needs code from the checkpoint (auto_map), which is never run"
        )
    raise ConfigurationError(
        f"{config.file}: architecture {name!r:.60} is not supported: {', '.join(ARCHITECTURES)}, or a causal language "
        "model of transformers that goes through its attention interface"
    )
