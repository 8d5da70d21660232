"""The flags of all commands: name, environment variable, help, bounds. Defaults are the commands' own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from trivium.config import DEFAULT_GPU_MEMORY_UTILIZATION, TOOL_CALL_PARSERS
from trivium.flag_values import parse_address, parse_memory


def _flag(name: str, text: str, **settings: Any) -> Any:
    return typer.Option(f"--{name}", envvar=f"TRIVIUM_{name.upper().replace('-', '_')}", help=text, **settings)


Model = Annotated[str, typer.Argument(metavar="[NAME=]SOURCE", help="Directory, hub id or bundled name.")]
Models = Annotated[list[str], typer.Argument(metavar="[NAME=]SOURCE", help="Directories, hub ids or bundled names.")]
Host = Annotated[str, _flag("host", "Address to serve HTTP on.")]
Port = Annotated[int, _flag("port", "Port to serve HTTP on; 0 takes a free one.", min=0, max=65535)]
ApiKey = Annotated[str | None, _flag("api-key", "Key that clients must send. Better set by environment.")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], _flag("log-level", "Least severe level to log.")]
Listen = Annotated[str, _flag("listen", "Address to serve gRPC on.", metavar="ADDRESS", parser=parse_address)]
TokenizerAddress = Annotated[str, _flag("tokenizer", "The tokenizer.", metavar="ADDRESS", parser=parse_address)]
ExecutorAddress = Annotated[str, _flag("executor", "The executor.", metavar="ADDRESS", parser=parse_address)]
Routes = Annotated[list[str], _flag("model", "A model and its scheduler; repeatable.", metavar="NAME=ADDRESS")]
SchedulerModel = Annotated[str, _flag("model", "Name of the model.", metavar="NAME")]
Dtype = Annotated[str, _flag("dtype", "Type of weights and activations; on a CPU float32, or bfloat16 for products.")]
Device = Annotated[str, _flag("device", "Where the model runs: auto, cpu or cuda.")]
Revision = Annotated[str | None, _flag("revision", "Branch, tag or commit of a hub model.")]
MaxModelLen = Annotated[int | None, _flag("max-model-len", "Most tokens of prompt and output.", min=1)]
MaxNumSeqs = Annotated[int, _flag("max-num-seqs", "Most sequences in one batch.", min=1)]
MaxNumBatchedTokens = Annotated[int, _flag("max-num-batched-tokens", "Most tokens in one step.", min=1)]
KvCacheMemory = Annotated[
    int | None,
    _flag(
        "kv-cache-memory", "Memory for keys and values, such as 512MiB or 2GiB.", metavar="SIZE", parser=parse_memory
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    _flag(
        "gpu-memory-utilization",
        f"Share of a GPU's memory to use, by default {DEFAULT_GPU_MEMORY_UTILIZATION}; no effect on a CPU.",
        min=0,
        max=1,
    ),
]
SwapSpace = Annotated[
    float, _flag("swap-space", "Host memory for the KV of preempted requests, in GiB; 0 computes it again.", min=0)
]
Quantization = Annotated[
    str | None,
    _flag(
        "quantization",
        "int8: multiply in 8-bit integers; faster, a little less exact. Default: what the checkpoint has.",
    ),
]
NumThreads = Annotated[int, _flag("num-threads", "Threads of one executor; 0 decides by the model's size.", min=0)]
TensorParallelSize = Annotated[
    int, _flag("tensor-parallel-size", "Processes of one executor, each with its part of the model.", min=1)
]
NumLocalExecutors = Annotated[int, _flag("num-local-executors", "Executors that share this machine's cores.", min=1)]
GenerationConfig = Annotated[
    str,
    _flag(
        "generation-config",
        "Defaults of requests: auto for the model's own generation_config.json, none, or a file or directory.",
        metavar="auto|none|PATH",
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager/--no-enforce-eager",
        envvar="TRIVIUM_ENFORCE_EAGER",
        help="Run every step operator by operator instead of recording decode steps, as graphs on a GPU.",
    ),
]
EnableLora = Annotated[
    bool,
    typer.Option("--enable-lora/--no-enable-lora", envvar="TRIVIUM_ENABLE_LORA", help="Serve LoRA adapters, too."),
]
LoraModules = Annotated[
    list[str],
    _flag(
        "lora-modules",
        'LoRA adapters of PEFT, as NAME=PATH ... or {"name": ..., "path": ..., "base_model_name": ...}.',
        metavar="NAME=PATH",
    ),
]
MaxLoraRank = Annotated[int, _flag("max-lora-rank", "Highest rank of an adapter.", min=1)]
MaxLoras = Annotated[int, _flag("max-loras", "Most adapters in one batch.", min=1)]
EnablePromptAdapter = Annotated[
    bool,
    typer.Option(
        "--enable-prompt-adapter/--no-enable-prompt-adapter",
        envvar="TRIVIUM_ENABLE_PROMPT_ADAPTER",
        help="Serve soft prompts, too.",
    ),
]
PromptAdapters = Annotated[
    list[str],
    _flag(
        "prompt-adapters",
        'Soft prompts of PEFT, as NAME=PATH ... or {"name": ..., "path": ..., "base_model_name": ...}.',
        metavar="NAME=PATH",
    ),
]
MaxPromptAdapters = Annotated[int, _flag("max-prompt-adapters", "Most soft prompts in one batch.", min=1)]
MaxPromptAdapterToken = Annotated[
    int, _flag("max-prompt-adapter-token", "Most virtual tokens of a soft prompt.", min=1)
]
DrainTimeout = Annotated[
    float, _flag("drain-timeout", "Seconds that running requests get to finish when the gateway is stopped.", min=0)
]
MaxWaitingRequests = Annotated[int, _flag("max-waiting-requests", "Queue length; more is refused.", min=1)]
MaxWaitingTokens = Annotated[int, _flag("max-waiting-tokens", "Prompt tokens in the queue; more is refused.", min=1)]
QueueTimeout = Annotated[float, _flag("queue-timeout", "Seconds that a request may wait to start; 0 for ever.", min=0)]
SchedulingPolicy = Annotated[
    Literal["fcfs", "priority"], _flag("scheduling-policy", "Whether the priority of a request counts.")
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        envvar="TRIVIUM_ENABLE_PREFIX_CACHING",
        help="Reuse what prompts have in common.",
    ),
]
EnablePromptEmbeds = Annotated[
    bool,
    typer.Option(
        "--enable-prompt-embeds/--no-enable-prompt-embeds",
        envvar="TRIVIUM_ENABLE_PROMPT_EMBEDS",
        help="Take prompts as embeddings over HTTP.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict",
        envvar="TRIVIUM_STRICT",
        help="Refuse requests with fields that no endpoint knows, instead of ignoring those.",
    ),
]
MaxRequestsPerMinute = Annotated[
    int, _flag("max-requests-per-minute", "POST requests of one API key, or address without keys; 0: no limit.", min=0)
]
EnableAutoToolChoice = Annotated[
    bool,
    typer.Option(
        "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
        envvar="TRIVIUM_ENABLE_AUTO_TOOL_CHOICE",
        help="Read calls of tools out of answers; needs --tool-call-parser.",
    ),
]
ToolCallParser = Annotated[
    list[str],
    _flag(
        "tool-call-parser",
        f"How models write calls: {', '.join(TOOL_CALL_PARSERS)}; for one of several models MODEL=NAME.",
        metavar="NAME",
    ),
]
MaxPlansInFlight = Annotated[
    int | None, _flag("max-plans-in-flight", "Steps planned ahead of the executor. Default: what it asks for.", min=1)
]
