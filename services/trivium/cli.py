"""The command `trivium`: reads flags and environment, builds frozen settings, hands over.

Importing this module, `--help` and every wrong command line must stay fast: services and everything heavy are
imported inside the commands. Every flag is also an environment variable, `--max-num-seqs` as TRIVIUM_MAX_NUM_SEQS;
the flag wins. A wrong setting is one line on stderr and exit code 2.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trivium import __version__
from trivium.config import (
    DEFAULT_GPU_MEMORY_UTILIZATION,
    DEFAULT_MAX_LORA_RANK,
    DEFAULT_MAX_LORAS,
    ExecutorConfig,
    LoRAModule,
    SchedulerConfig,
    ServedModel,
)
from trivium.errors import ConfigurationError
from trivium.process import (
    EXIT_CONFIGURATION,
    configure_logging,
    end_process,
    print_error,
    run_service,
    wait_passively,
)

MAX_SOCKET_PATH_BYTES = 107

_MEMORY = re.compile(r"(\d+)\s*(?:([KMGT])(i?)B)?", re.IGNORECASE | re.ASCII)
_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    started_at = time.monotonic()
    args = spread_values(sys.argv[1:] if args is None else args, "--lora-modules")
    try:
        result = typer.main.get_command(app).main(args=args, prog_name="trivium", standalone_mode=False, obj=started_at)
    except typer.TyperException as error:
        print_error(error.format_message())
        return EXIT_CONFIGURATION
    except ConfigurationError as error:
        print_error(error.message)
        return EXIT_CONFIGURATION
    except (typer.Abort, KeyboardInterrupt):
        return 130
    return result if isinstance(result, int) else 0


def parse_memory(text: str) -> int:
    """Bytes of `512MiB`, `2GiB`, `2GB` or a plain number."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"expected bytes or a size such as 512MiB or 2GiB, got {text!r}")
    number, unit, binary = match.groups()
    num_bytes = int(number)
    for _ in range(" KMGT".index((unit or " ").upper())):
        num_bytes *= 1024 if binary else 1000
    return num_bytes


def parse_address(text: str) -> str:
    """`text` itself if it is `unix:/absolute/path` or `host:port`."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise typer.BadParameter(f"a Unix socket needs an absolute path, as in unix:/run/x.sock, got {text!r}")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise typer.BadParameter(f"a Unix socket path has at most {MAX_SOCKET_PATH_BYTES} bytes, got {text!r}")
        return text
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or not 0 < int(match[1]) < 65536:
        raise typer.BadParameter(f"expected unix:/path or HOST:PORT, got {text!r}")
    return text


def parse_models(texts: Sequence[str]) -> tuple[ServedModel, ...]:
    """The models named on a command line. Raises ConfigurationError on an empty part or a name given twice."""
    models = tuple(ServedModel.parse(text) for text in texts)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"model name {name!r} is given {names.count(name)} times")
    return models


def parse_routes(texts: Sequence[str]) -> dict[str, str]:
    """model name -> scheduler address, of `NAME=ADDRESS` texts."""
    routes: dict[str, str] = {}  # model name -> scheduler address
    for text in texts:
        name, _, address = text.partition("=")
        if not name or not address:
            raise ConfigurationError(f"--model must be NAME=SCHEDULER_ADDRESS, got {text!r}")
        if name in routes:
            raise ConfigurationError(f"model name {name!r} is given twice")
        routes[name] = parse_address(address)
    return routes


def parse_lora_modules(texts: Sequence[str], models: Sequence[ServedModel]) -> tuple[LoRAModule, ...]:
    """The adapters named on a command line, each with its base model.

    Raises ConfigurationError for a name that is given twice, and for an adapter whose base is not clear.
    """
    modules = []
    served = [model.name for model in models]
    taken = set(served)
    for module in map(LoRAModule.parse, texts):
        if module.name in taken:
            raise ConfigurationError(f"model name {module.name!r} is given twice")
        taken.add(module.name)
        if module.base is None and len(served) > 1:
            raise ConfigurationError(
                f"LoRA module {module.name!r} must name its base_model_name, because several models are served"
            )
        if module.base not in (None, *served):
            raise ConfigurationError(f"base_model_name {module.base!r} of LoRA module {module.name!r} is not served")
        modules.append(replace(module, base=module.base or served[0]))
    return tuple(modules)


def spread_values(args: Sequence[str], flag: str) -> list[str]:
    """`args` with `flag A=1 B=2` as `flag A=1 flag B=2`: a flag that takes values up to the next flag."""
    spread: list[str] = []
    is_open = False
    for arg in args:
        if is_open and not arg.startswith("-") and spread[-1] != flag:
            spread.append(flag)
        is_open = arg == flag or (is_open and not arg.startswith("-"))
        spread.append(arg)
    return spread


def check_local_source(model: ServedModel) -> None:
    """Raise ConfigurationError if the source is a path that cannot be a checkpoint; a hub id is not looked up."""
    looks_like_path = model.source.startswith(("/", "./", "../", "~"))
    if looks_like_path and not Path(model.source).is_dir():
        raise ConfigurationError(f"model {model.name!r}: there is no directory {model.source}")


def command_flags(**settings: object) -> tuple[str, ...]:
    """Command-line flags for the settings that are not None: `max_num_seqs=8` as `--max-num-seqs 8`."""
    return tuple(
        part
        for name, value in settings.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    )


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
Dtype = Annotated[str, _flag("dtype", "Type of weights and activations.")]
Device = Annotated[str, _flag("device", "Where the model runs.")]
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
    str | None, _flag("quantization", "int8: multiply in 8-bit integers; faster, a little less exact. Default: no.")
]
NumThreads = Annotated[int, _flag("num-threads", "Threads of one executor; 0 decides by the model's size.", min=0)]
NumLocalExecutors = Annotated[int, _flag("num-local-executors", "Executors that share this machine's cores.", min=1)]
GenerationConfig = Annotated[
    str,
    _flag(
        "generation-config",
        "Defaults of requests: auto for the model's own generation_config.json, none, or a file or directory.",
        metavar="auto|none|PATH",
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
MaxPlansInFlight = Annotated[int, _flag("max-plans-in-flight", "Steps planned ahead of the executor.", min=1)]

app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trivium {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def trivium(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Trivium, a language-model server: `trivium serve` runs all of it, the other commands one service each."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def serve(
    context: typer.Context,
    models: Models = [],  # noqa: B006 (never changed; typer reads the default as "none given")
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    kv_cache_memory: KvCacheMemory = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    swap_space: SwapSpace = 0.0,
    quantization: Quantization = None,
    num_threads: NumThreads = 0,
    generation_config: GenerationConfig = "auto",
    enable_lora: EnableLora = False,
    lora_modules: LoraModules = [],  # noqa: B006
    max_lora_rank: MaxLoraRank = DEFAULT_MAX_LORA_RANK,
    max_loras: MaxLoras = DEFAULT_MAX_LORAS,
    max_waiting_requests: MaxWaitingRequests = 4096,
    max_waiting_tokens: MaxWaitingTokens = 4 * 2**20,
    queue_timeout: QueueTimeout = 600.0,
    scheduling_policy: SchedulingPolicy = "fcfs",
    enable_prefix_caching: EnablePrefixCaching = True,
    enable_prompt_embeds: EnablePromptEmbeds = False,
    api_key: ApiKey = None,
    log_level: LogLevel = "info",
) -> None:
    """Serve models on this machine: gateway, tokenizer and, per model, scheduler and executor.

    Without a model it serves the bundled ones. Their executors share the cores.
    """
    from trivium.demo import BUNDLED_MODELS
    from trivium.supervisor import ServeConfig
    from trivium.supervisor import serve as serve_all

    served = parse_models(models or BUNDLED_MODELS)
    for model in served:
        check_local_source(model)
    modules = parse_lora_modules(lora_modules, served)
    if modules and not enable_lora:
        raise ConfigurationError("--lora-modules needs --enable-lora")
    _check_api_key(api_key)
    configure_logging("supervisor", log_level)
    config = ServeConfig(
        models=served,
        host=host,
        port=port,
        api_key=api_key,
        log_level=log_level,
        engine_flags=command_flags(
            dtype=dtype,
            device=device,
            revision=revision,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space=swap_space,
            quantization=quantization,
            num_threads=num_threads,
            generation_config=generation_config,
        ),
        scheduler_flags=(
            *command_flags(
                max_waiting_requests=max_waiting_requests,
                max_waiting_tokens=max_waiting_tokens,
                queue_timeout=queue_timeout,
                scheduling_policy=scheduling_policy,
            ),
            "--enable-prefix-caching" if enable_prefix_caching else "--no-enable-prefix-caching",
        ),
        lora_flags=("--enable-lora", *command_flags(max_lora_rank=max_lora_rank, max_loras=max_loras))
        if enable_lora
        else (),
        lora_modules=modules,
        revision=revision,
        enable_prompt_embeds=enable_prompt_embeds,
        started_at=context.obj,
    )
    raise typer.Exit(serve_all(config))


@app.command()
def gateway(
    model: Routes,
    tokenizer: TokenizerAddress,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    drain_timeout: DrainTimeout = 5.0,
    enable_prompt_embeds: EnablePromptEmbeds = False,
    log_level: LogLevel = "info",
) -> None:
    """Serve the OpenAI protocol over HTTP for models whose schedulers run elsewhere."""
    routes = parse_routes(model)
    _check_api_key(api_key)

    async def run(stop: asyncio.Event) -> None:
        from trivium_gateway.app import serve as serve_gateway

        await serve_gateway(
            models=routes,
            tokenizer=tokenizer,
            host=host,
            port=port,
            api_key=api_key,
            stop=stop,
            drain_timeout_s=drain_timeout,
            enable_prompt_embeds=enable_prompt_embeds,
        )

    preload = ("trivium_gateway.app",)
    end_process(run_service("gateway", run, preload=preload, log_level=log_level, is_traced=True))


@app.command()
def tokenizer(models: Models, listen: Listen, revision: Revision = None, log_level: LogLevel = "info") -> None:
    """Render, tokenize and detokenize for the named models."""
    from trivium.tokenizer.torch_free import forbid_torch

    served = parse_models(models)
    forbid_torch()

    async def run(stop: asyncio.Event) -> None:
        from trivium.tokenizer.server import serve as serve_tokenizer

        await serve_tokenizer(served, listen, stop, revision=revision)

    end_process(run_service("tokenizer", run, preload=("trivium.tokenizer.server",), log_level=log_level))


@app.command()
def scheduler(
    model: SchedulerModel,
    executor: ExecutorAddress,
    tokenizer: TokenizerAddress,
    listen: Listen,
    max_waiting_requests: MaxWaitingRequests = 4096,
    max_waiting_tokens: MaxWaitingTokens = 4 * 2**20,
    queue_timeout: QueueTimeout = 600.0,
    scheduling_policy: SchedulingPolicy = "fcfs",
    enable_prefix_caching: EnablePrefixCaching = True,
    max_plans_in_flight: MaxPlansInFlight = 2,
    log_level: LogLevel = "info",
) -> None:
    """Own the requests of one model: queue, batches, blocks, stop verdicts."""
    config = SchedulerConfig(
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
        queue_timeout_s=queue_timeout,
        scheduling_policy=scheduling_policy,
        enable_prefix_caching=enable_prefix_caching,
        max_plans_in_flight=max_plans_in_flight,
    )

    async def run(stop: asyncio.Event) -> None:
        from trivium.scheduler.server import serve as serve_scheduler

        await serve_scheduler(model, executor, tokenizer, listen, config, stop)

    name, preload = f"scheduler {model}", ("trivium.scheduler.server",)
    end_process(run_service(name, run, preload=preload, log_level=log_level, is_traced=True))


@app.command()
def executor(
    model: Model,
    listen: Listen,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    kv_cache_memory: KvCacheMemory = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    swap_space: SwapSpace = 0.0,
    quantization: Quantization = None,
    num_threads: NumThreads = 0,
    num_local_executors: NumLocalExecutors = 1,
    generation_config: GenerationConfig = "auto",
    enable_lora: EnableLora = False,
    lora_modules: LoraModules = [],  # noqa: B006
    max_lora_rank: MaxLoraRank = DEFAULT_MAX_LORA_RANK,
    max_loras: MaxLoras = DEFAULT_MAX_LORAS,
    log_level: LogLevel = "info",
) -> None:
    """Load one model and run its steps."""
    served = ServedModel.parse(model)
    config = ExecutorConfig(
        model=served.source,
        served_model_name=served.name,
        dtype=dtype,
        device=device,
        revision=revision,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        swap_space_gib=swap_space,
        quantization=quantization,
        num_threads=num_threads,
        num_local_executors=num_local_executors,
        generation_config=generation_config,
        enable_lora=enable_lora,
        lora_modules=parse_lora_modules(lora_modules, [served]),
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
    )

    async def run(stop: asyncio.Event) -> None:
        from trivium.executor.server import serve as serve_executor

        await serve_executor(config, listen, stop)

    wait_passively()
    name, preload = f"executor {served.name}", ("trivium.executor.server",)
    end_process(run_service(name, run, preload=preload, log_level=log_level))


def _check_api_key(api_key: str | None) -> None:
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("--api-key must not be empty")


if __name__ == "__main__":
    sys.exit(main())
