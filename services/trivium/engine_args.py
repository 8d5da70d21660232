"""The arguments of `LLM` and `AsyncLLM`: vLLM's names, each with its meaning or refused by name with the reason.

| where | what it means |
|---|---|
| fields of `EngineArgs` | the argument works |
| `HOLDS` | what it asks for is so already, whatever its value; the log says so |
| `REFUSED` | only the values that mean "not used" are taken |

A name that is nowhere here is a TypeError, as of any Python function. `docs/offline.md` shows the same to users.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from trivium.config import (
    BLOCK_SIZE,
    DEFAULT_MAX_LORA_RANK,
    DEFAULT_MAX_LORAS,
    DEFAULT_MAX_PROMPT_ADAPTER_TOKEN,
    DEFAULT_MAX_PROMPT_ADAPTERS,
    ExecutorConfig,
    GenerationDefaults,
    SchedulerConfig,
)
from trivium.errors import ConfigurationError
from trivium.params import MAX_LOGPROBS

logger = logging.getLogger(__name__)

UNBOUNDED_QUEUE = 2**31  # offline, the caller's own list of prompts is the queue

_ANY_LENGTH = "decode steps are recorded for any length"
_ONE_MODEL = "one object is one model, which tensor_parallel_size splits"
_TEXT_ONLY = "prompts are text"

# name -> (type of its values, why it holds)
HOLDS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_seq_len_to_capture": ((int,), _ANY_LENGTH),
    "max_context_len_to_capture": ((int, type(None)), _ANY_LENGTH),
    "disable_custom_all_reduce": ((bool,), "ranks add up by torch.distributed"),
    "disable_log_stats": ((bool,), "offline no statistics are logged"),
    "use_v2_block_manager": ((bool,), "there is one block manager"),
}

# name -> (values that mean "not used", why others are refused and what to do instead)
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "tokenizer_mode": (("auto", None), "transformers has one tokenizer for each model: leave it at 'auto'"),
    "trust_remote_code": ((False, None), "code from a checkpoint is never run: the supported families need none"),
    "code_revision": ((None,), "code from a checkpoint is never run"),
    "pipeline_parallel_size": ((1,), _ONE_MODEL),
    "data_parallel_size": ((1,), _ONE_MODEL + ": start one LLM per process"),
    "enable_expert_parallel": ((False,), _ONE_MODEL + ": every rank has a part of every expert"),
    "distributed_executor_backend": ((None, "uni", "mp"), "ranks are this process and others that it starts"),
    "cpu_offload_gb": ((0, None), "the weights are where the model runs"),
    "load_format": (("auto", "safetensors", None), "weights are read from safetensors, else from pytorch_model.bin"),
    "download_dir": ((None,), "the hub's own cache is used: set the environment variable HF_HUB_CACHE"),
    "hf_token": ((None,), "set the environment variable HF_TOKEN"),
    "hf_overrides": ((None, {}), "the checkpoint's config.json is taken as it is"),
    "rope_scaling": ((None, {}), "the checkpoint's config.json is taken as it is"),
    "rope_theta": ((None,), "the checkpoint's config.json is taken as it is"),
    "kv_cache_dtype": (("auto",), "keys and values have the type of the model, see dtype"),
    "enable_chunked_prefill": ((None, True), "prompts are always computed in chunks: raise max_num_batched_tokens"),
    "num_gpu_blocks_override": ((None,), "set kv_cache_memory_bytes"),
    "disable_sliding_window": ((False,), "the window is part of the model"),
    "max_cpu_loras": ((None,), "adapters stay in memory once loaded"),
    "lora_modules": ((None, []), "give each request its lora_request"),
    "prompt_adapters": ((None, []), "give each request its prompt_adapter_request"),
    "structured_outputs_config": ((None, {}), "there is nothing to choose"),
    "guided_decoding_backend": ((None, "auto"), "there is nothing to choose"),
    "speculative_config": (
        (None, {}),
        "tokens are drafted by prompt_lookup_num_tokens of a request",
    ),
    "kv_transfer_config": ((None,), "keys and values stay in this process"),
    "kv_events_config": ((None,), "offline nobody listens to events"),
    "otlp_traces_endpoint": ((None,), "only the server is traced: set OTEL_EXPORTER_OTLP_ENDPOINT for it"),
    "shutdown_timeout": ((None, 0), "close() aborts what runs"),
    "logits_processors": ((None, []), "code of a caller does not run in the model's step: use logit_bias, bad_words"),
    "pooler_config": ((None,), "give pooling_type and normalize to embed()"),
    "compilation_config": ((None, 0, {}), "nothing is compiled; enforce_eager turns recorded steps off"),
    "num_scheduler_steps": ((1,), "every step is scheduled"),
    "limit_mm_per_prompt": ((None, {}), _TEXT_ONLY),
    "mm_processor_kwargs": ((None, {}), _TEXT_ONLY),
    "allowed_local_media_path": ((None, ""), _TEXT_ONLY),
}

_SWITCH = ((bool,), "True or False")
_INTEGER = ((int,), "an integer")
_INTEGER_OR_NONE = ((int, type(None)), "an integer or None")
_TEXT = ((str,), "text")
_TEXT_OR_NONE = ((str, type(None)), "text or None")

# name -> (types of its values, what they are called); a bool is no integer
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("skip_tokenizer_init", "enable_prefix_caching", "disable_async_output_proc"), _SWITCH),
    **dict.fromkeys(("enable_lora", "enable_prompt_adapter", "enable_prompt_embeds"), _SWITCH),
    "async_scheduling": ((bool, type(None)), "True, False or None"),
    "enforce_eager": ((bool, type(None)), "True, False or None"),
    **dict.fromkeys(("max_num_seqs", "max_num_batched_tokens", "block_size", "num_threads"), _INTEGER),
    **dict.fromkeys(("tensor_parallel_size", "seed", "max_logprobs", "max_lora_rank", "max_loras"), _INTEGER),
    **dict.fromkeys(("max_prompt_adapters", "max_prompt_adapter_token"), _INTEGER),
    **dict.fromkeys(("kv_cache_memory_bytes", "max_num_queued_reqs", "max_num_queued_tokens"), _INTEGER_OR_NONE),
    "max_model_len": ((int, str, type(None)), "a number or 'auto'"),
    "swap_space": ((int, float), "a number of GiB"),
    "gpu_memory_utilization": ((int, float, type(None)), "a number or None"),
    **dict.fromkeys(("dtype", "device", "scheduling_policy", "generation_config"), _TEXT),
    **dict.fromkeys(("revision", "tokenizer_revision", "served_model_name", "quantization"), _TEXT_OR_NONE),
    "tokenizer": ((str, PathLike, type(None)), "text or None"),
    "override_generation_config": ((Mapping,), "a dict"),
}

_TASKS = ("auto", "generate", "embed", "embedding", None)
_RUNNERS = ("auto", "generate", "pooling", None)
_SPECIAL_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_OVERRIDABLE = frozenset(item.name for item in fields(GenerationDefaults)) | frozenset(_SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """A model in this process. Raises ConfigurationError that names the argument.

    model: a local directory, a bundled name ("trivium-chat", "trivium-translate") or a hub id; revision: of the hub.
    tokenizer, tokenizer_revision: instead of the model's own. skip_tokenizer_init: token ids in, token ids out.
    dtype: "auto", "float", "float32", "bfloat16" or "float16"; on a GPU "auto" is the checkpoint's own type; on a CPU
    all of them compute in float32, but for the products of "bfloat16". device: "auto", "cpu" or "cuda".
    seed: drives the requests that have no seed of their own, in the order in which they are given.
    max_model_len: None and "auto" take the model's own, or what the KV cache holds if that is less.
    kv_cache_memory_bytes: None takes a share of free memory, and the log says how many tokens that is.
    tensor_parallel_size: processes that share the model, this one and others that it starts; kv_cache_memory_bytes
    and swap_space are of each.
    gpu_memory_utilization: the share of a GPU's memory to use, 0.9 by default; it has no effect on a CPU.
    swap_space: GiB of host memory for the keys and values of preempted requests; 0 has them computed again.
    generation_config: "auto" for the model's own generation_config.json, "none", or the path of another;
    override_generation_config: what to replace in it. max_logprobs: the most that a request may ask for.
    disable_async_output_proc (async_scheduling=False): a step is not planned before the one before it has ended.
    max_num_queued_reqs, max_num_queued_tokens: how much may wait; None is no bound.
    quantization: None, or "int8" for 8-bit matrix products: faster, a little less exact. What a checkpoint has packed
    needs no argument; one that names it ("awq", "gptq", "fp8", "compressed-tensors") is checked.
    enforce_eager: no decode step is recorded to be replayed, neither as a graph on a GPU nor as a list on a CPU.
    enable_lora: prompts can have a `lora_request`, of at most max_lora_rank, at most max_loras of them in one batch.
    enable_prompt_adapter: the same for a `prompt_adapter_request`, of at most max_prompt_adapter_token virtual tokens,
    at most max_prompt_adapters of them in one batch.
    enable_prompt_embeds: takes prompts as embeddings (EmbedsPrompt).
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    served_model_name: str | None = None
    seed: int = 0
    max_model_len: int | str | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = BLOCK_SIZE
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    swap_space: float = 0.0
    quantization: str | None = None
    enforce_eager: bool | None = False
    num_threads: int = 0
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    disable_async_output_proc: bool = False
    async_scheduling: bool | None = None
    max_logprobs: int = MAX_LOGPROBS
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    enable_lora: bool = False
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK
    max_loras: int = DEFAULT_MAX_LORAS
    enable_prompt_adapter: bool = False
    max_prompt_adapters: int = DEFAULT_MAX_PROMPT_ADAPTERS
    max_prompt_adapter_token: int = DEFAULT_MAX_PROMPT_ADAPTER_TOKEN
    enable_prompt_embeds: bool = False
    task: str | None = "auto"
    runner: str | None = "auto"

    def __post_init__(self) -> None:
        for name, (types, words) in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigurationError(f"{name} must be {words}, got {value!r:.40}")
        if not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise ConfigurationError(f"max_logprobs must be in [0, {MAX_LOGPROBS}], got {self.max_logprobs}")
        if isinstance(self.max_model_len, str) and self.max_model_len != "auto":
            raise ConfigurationError(f"max_model_len must be a number or 'auto', got {self.max_model_len!r:.40}")
        if self.task not in _TASKS:
            raise ConfigurationError(f"task {self.task!r:.40} is not supported: 'auto', 'generate' and 'embed' are")
        if self.runner not in _RUNNERS:
            raise ConfigurationError(f"runner {self.runner!r:.40} is not supported: 'auto', 'generate', 'pooling' are")
        if self.disable_async_output_proc and self.async_scheduling:
            raise ConfigurationError("disable_async_output_proc and async_scheduling contradict each other")
        for name in self.override_generation_config:
            if name not in _OVERRIDABLE:
                raise ConfigurationError(f"override_generation_config: {name!r:.60} is not supported")

    def executor_config(self) -> ExecutorConfig:
        return ExecutorConfig(
            model=self.model,
            served_model_name=self.served_model_name or self.model,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            max_model_len=None if isinstance(self.max_model_len, str) else self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            swap_space_gib=self.swap_space,
            quantization=self.quantization,
            enforce_eager=bool(self.enforce_eager),
            tokenizer=self.tokenizer,
            num_threads=self.num_threads,
            tensor_parallel_size=self.tensor_parallel_size,
            generation_config=self.generation_config,
            override_generation_config=self.override_generation_config,
            enable_lora=self.enable_lora,
            max_lora_rank=self.max_lora_rank,
            max_loras=self.max_loras,
            enable_prompt_adapter=self.enable_prompt_adapter,
            max_prompt_adapters=self.max_prompt_adapters,
            max_prompt_adapter_token=self.max_prompt_adapter_token,
        )

    def scheduler_config(self) -> SchedulerConfig:
        is_lockstep = self.disable_async_output_proc or self.async_scheduling is False
        return SchedulerConfig(
            max_waiting_requests=_bound(self.max_num_queued_reqs),
            max_waiting_tokens=_bound(self.max_num_queued_tokens),
            max_embeds_bytes=sys.maxsize,
            queue_timeout_s=0.0,
            scheduling_policy=self.scheduling_policy,
            enable_prefix_caching=self.enable_prefix_caching,
            max_plans_in_flight=1 if is_lockstep else None,
        )

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.model

    @property
    def tokenizer_source_revision(self) -> str | None:
        """The model's revision means nothing to a tokenizer from elsewhere."""
        is_own = self.tokenizer in (None, self.model)
        return self.tokenizer_revision or (self.revision if is_own else None)


def read_engine_args(model: str, given: Mapping[str, Any]) -> EngineArgs:
    """The arguments of a constructor. Raises ConfigurationError for a value, TypeError for an unknown name."""
    working = {item.name for item in fields(EngineArgs)} - {"model"}
    for name, value in given.items():
        if name in HOLDS:
            types, reason = HOLDS[name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigurationError(
                    f"{name} must be {' or '.join(kind.__name__ for kind in types)}: {value!r:.40}"
                )
            logger.info("%s=%r changes nothing: %s", name, value, reason)
        elif name in REFUSED:
            unused, reason = REFUSED[name]
            if not any(_is_same(value, item) for item in unused):
                raise ConfigurationError(f"{name}={value!r:.60} is not supported: {reason}")
        elif name not in working:
            close = difflib.get_close_matches(name, [*working, *HOLDS, *REFUSED], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{hint}")
    return EngineArgs(model=model, **{name: value for name, value in given.items() if name in working})


def _is_same(value: object, other: object) -> bool:
    """Equal, and both numbers or of one type: 0.0 is 0, but False is not."""
    kinds = [float if type(item) is int else type(item) for item in (value, other)]
    return kinds[0] is kinds[1] and value == other


def _bound(value: int | None) -> int:
    return UNBOUNDED_QUEUE if value is None else value
