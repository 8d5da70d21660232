"""Frozen settings of every process, and the facts about a loaded model that the processes share.

Standard library only. A setting's origin is flag > environment (`TRIVIUM_*`) > default; `cli.py` reads both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trivium.errors import ConfigurationError

BLOCK_SIZE = 16  # token slots per KV block
PROTOCOL_REVISION = 1
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
DEFAULT_PLANS_IN_FLIGHT = 2
GPU_PLANS_IN_FLIGHT = 4
DEFAULT_MAX_LORA_RANK = 16
DEFAULT_MAX_LORAS = 8
DEFAULT_MAX_PROMPT_ADAPTERS = 8
DEFAULT_MAX_PROMPT_ADAPTER_TOKEN = 512
QUANTIZATIONS = ("int8",)  # of float weights
PACKED_QUANTIZATIONS = ("awq", "gptq", "fp8", "fbgemm_fp8", "compressed-tensors")  # that checkpoints have
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral", "pythonic")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says, in the words of transformers; None where it says nothing.

    suppress_tokens, begin_suppress_tokens and bad_words_ids apply to every request, the others to what a request
    leaves unset (`generation_defaults.py`). max_length and min_length count the decoder prompt, too.
    """

    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None


@dataclass(frozen=True, slots=True)
class PromptAdapter:
    """A soft prompt that is loaded: so many virtual tokens ahead of the prompt, or of the encoder input."""

    name: str
    num_virtual_tokens: int
    of_encoder: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model, told by the executor and passed on to scheduler, gateway and clients.

    max_model_len: decoder tokens (prompt + output). max_encoder_len: encoder tokens, 0 for decoder-only models.
    forced_bos_token_id / forced_eos_token_id: forced as the first generated token / at the length limit.
    num_blocks and block_size describe the KV pool, num_host_blocks the host memory that KV can be swapped to.
    generation_defaults: what the checkpoint says about requests that leave something unset. adapters: names of those
    that are loaded, of which the rows of one batch have at most max_loras; prompt_adapters and max_prompt_adapters: the
    same of soft prompts. hidden_size: width of prompt embeddings, 0 if the model takes none. max_plans_in_flight: how
    many plans keep the executor's device busy while results travel; 0: it does not say.
    """

    name: str
    architecture: str
    is_encoder_decoder: bool
    max_model_len: int
    max_encoder_len: int
    vocab_size: int
    dtype: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    num_host_blocks: int = 0
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    adapters: tuple[str, ...] = ()
    max_loras: int = 0
    hidden_size: int = 0
    prompt_adapters: tuple[PromptAdapter, ...] = ()
    max_prompt_adapters: int = 0
    max_plans_in_flight: int = 0

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of both kinds. No two adapters have the same name."""
        return (*self.adapters, *(adapter.name for adapter in self.prompt_adapters))

    def find_prompt_adapter(self, name: str) -> PromptAdapter | None:
        return next((adapter for adapter in self.prompt_adapters if adapter.name == name), None)

    def limited_by(self, prompt_adapter: str) -> ModelInfo:
        """What a request with this soft prompt, if it is one, has of the model: its virtual tokens take their room."""
        adapter = self.find_prompt_adapter(prompt_adapter)
        if adapter is None:
            return self
        if adapter.of_encoder:
            return replace(self, max_encoder_len=self.max_encoder_len - adapter.num_virtual_tokens)
        return replace(self, max_model_len=self.max_model_len - adapter.num_virtual_tokens)


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapter as named on the command line. base: the served model that it is for; None for the only one."""

    name: str
    source: str
    base: str | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterModule:
        """Read `NAME=SOURCE` or `{"name": ..., "path": ..., "base_model_name": ...}`. Raises ConfigurationError."""
        if text.lstrip().startswith("{"):
            return cls._parse_json(text)
        name, _, source = text.partition("=")
        if not name or not source:
            raise ConfigurationError(f"an adapter must be NAME=SOURCE or a JSON object, got {text!r}")
        return cls(name, source)

    @classmethod
    def _parse_json(cls, text: str) -> AdapterModule:
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"adapter {text!r} is not valid JSON: {error}") from None
        unknown = set(fields) - {"name", "path", "base_model_name"}
        values = [fields.get(key) for key in ("name", "path", "base_model_name")]
        if unknown or not all(isinstance(value, str) and value for value in values[: 2 + (values[2] is not None)]):
            raise ConfigurationError(f"an adapter has name, path and base_model_name, got {text!r}")
        return cls(*values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """Settings of one executor.

    model: a local directory, a bundled name or a hub id. device: "auto" takes a GPU where torch finds one. dtype: on a
    GPU "auto" is the checkpoint's own type; on a CPU all is computed in float32, but with "bfloat16" the products of
    linear layers, where the processor has instructions for it. kv_cache_memory_bytes: None
    takes the default share of free memory, on a GPU what gpu_memory_utilization (None: 0.9) of its memory leaves beside
    the weights. swap_space_gib: host memory for the KV of preempted requests; 0 has them compute it again.
    quantization: None, or "int8": 8-bit weights and activations in every linear layer; the name of a format that
    checkpoints are packed in must be that of the checkpoint, which needs no naming. enforce_eager: no decode step is
    recorded to be replayed. max_model_len: None takes the model's own, or what the KV cache holds if that is less.
    num_threads: 0 decides by the size of the model and the cores, of which `num_local_executors` executors on this
    machine take equal shares. tensor_parallel_size: how many processes, ranks, share the work of every step, and the
    threads; each has its part of the weights, a KV pool of kv_cache_memory_bytes and host memory of swap_space_gib.
    generation_config: "auto" for the checkpoint's own generation_config.json, "none", or the path of another;
    override_generation_config: what to replace in it. tokenizer: where the model's own is not what texts are made of;
    grammars need it. enable_lora: LoRA adapters can be used, of at most max_lora_rank, at most max_loras of them in one
    batch; lora_modules are loaded at start. enable_prompt_adapter: the same of soft prompts, which have at most
    max_prompt_adapter_token virtual tokens each.
    """

    model: str
    served_model_name: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    swap_space_gib: float = 0.0
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = BLOCK_SIZE
    num_threads: int = 0
    num_local_executors: int = 1
    tensor_parallel_size: int = 1
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    enable_lora: bool = False
    lora_modules: tuple[AdapterModule, ...] = ()
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK
    max_loras: int = DEFAULT_MAX_LORAS
    enable_prompt_adapter: bool = False
    prompt_adapters: tuple[AdapterModule, ...] = ()
    max_prompt_adapters: int = DEFAULT_MAX_PROMPT_ADAPTERS
    max_prompt_adapter_token: int = DEFAULT_MAX_PROMPT_ADAPTER_TOKEN
    tokenizer: str | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_local_executors",
            "tensor_parallel_size",
            "max_lora_rank",
            "max_loras",
            "max_prompt_adapters",
            "max_prompt_adapter_token",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        names = [self.served_model_name, *(module.name for module in (*self.lora_modules, *self.prompt_adapters))]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigurationError(f"model name {twice!r} is given {names.count(twice)} times")
        if self.lora_modules and not self.enable_lora:
            raise ConfigurationError("lora_modules need enable_lora")
        if self.prompt_adapters and not self.enable_prompt_adapter:
            raise ConfigurationError("prompt_adapters need enable_prompt_adapter")
        for name in ("kv_cache_memory_bytes", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigurationError(
                f"gpu_memory_utilization must be more than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if not 0 <= self.swap_space_gib < math.inf:
            raise ConfigurationError(f"swap_space must be a number of GiB, 0 or more, got {self.swap_space_gib}")
        methods = (*QUANTIZATIONS, *PACKED_QUANTIZATIONS)
        if self.quantization not in (None, *methods):
            raise ConfigurationError(f"quantization must be one of {', '.join(methods)}, got {self.quantization!r}")
        if self.num_threads < 0:
            raise ConfigurationError(f"num_threads must not be negative, got {self.num_threads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one scheduler. A request over a limit is refused, not dropped.

    max_waiting_requests, max_waiting_tokens (of prompts): bounds of the queue. max_embeds_bytes: of the prompt
    embeddings of all requests, which are kept until a request has finished. queue_timeout_s: how long a request may
    wait for its first step, 0 for ever. scheduling_policy: "fcfs" (tenants take turns) or "priority" (and a request's
    `priority` comes first). max_plans_in_flight: so that the executor's round trip is hidden; None takes what the
    executor says, which is 2 on a CPU and 4 on a GPU.
    """

    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 4 * 2**20
    max_embeds_bytes: int = 512 * 2**20
    queue_timeout_s: float = 600.0
    scheduling_policy: str = "fcfs"
    enable_prefix_caching: bool = True
    max_plans_in_flight: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_waiting_requests", "max_waiting_tokens", "max_embeds_bytes", "max_plans_in_flight"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.queue_timeout_s < 0:
            raise ConfigurationError(f"queue_timeout_s must not be negative, got {self.queue_timeout_s}")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ConfigurationError(f"scheduling_policy must be fcfs or priority, got {self.scheduling_policy!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How a gateway treats its clients.

    api_key: what they must send, None for nothing. enable_prompt_embeds: prompts may come as embeddings. strict: a
    field that the endpoint does not know is refused instead of ignored. max_requests_per_minute: of one caller, 0 for
    no limit. drain_timeout_s: what running requests get to finish when the gateway is stopped.
    tool_parsers: served name -> how its calls of tools are read; the name "" is for all other models.
    """

    api_key: str | None = field(default=None, repr=False)
    enable_prompt_embeds: bool = False
    strict: bool = False
    max_requests_per_minute: int = 0
    drain_timeout_s: float = 5.0
    tool_parsers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigurationError("the API key is empty")
        if self.max_requests_per_minute < 0:
            raise ConfigurationError(
                f"max_requests_per_minute must not be negative, got {self.max_requests_per_minute}"
            )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as named on the command line: `NAME=PATH_OR_HUB_ID`, or just one of them."""

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> ServedModel:
        """Read `NAME=SOURCE` or `SOURCE`; the name defaults to the source without trailing slashes.

        Raises ConfigurationError on an empty part.
        """
        name, separator, source = text.partition("=")
        if not separator:
            name, source = text.rstrip("/"), text
        if not name or not source:
            raise ConfigurationError(f"model must be SOURCE or NAME=SOURCE, got {text!r}")
        return cls(name=name, source=source)
