"""The command `trivium`: reads flags and environment, builds frozen settings, hands over.

Importing this module, `--help` and every wrong command line must stay fast: services and everything heavy are
imported inside the commands. Every flag is also an environment variable, `--max-num-seqs` as TRIVIUM_MAX_NUM_SEQS;
the flag wins. A wrong setting is one line on stderr and exit code 2.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from trivium import __version__, flags
from trivium.config import (
    DEFAULT_MAX_LORA_RANK,
    DEFAULT_MAX_LORAS,
    DEFAULT_MAX_PROMPT_ADAPTER_TOKEN,
    DEFAULT_MAX_PROMPT_ADAPTERS,
    ExecutorConfig,
    GatewayConfig,
    SchedulerConfig,
    ServedModel,
)
from trivium.errors import ConfigurationError
from trivium.flag_values import (
    check_api_key,
    check_local_source,
    command_flags,
    parse_adapters,
    parse_models,
    parse_routes,
    parse_tool_parsers,
    spread_values,
)
from trivium.process import (
    EXIT_CONFIGURATION,
    configure_logging,
    end_process,
    print_error,
    run_service,
    wait_passively,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    started_at = time.monotonic()
    args = spread_values(sys.argv[1:] if args is None else args, ("--lora-modules", "--prompt-adapters"))
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
    models: flags.Models = [],  # noqa: B006 (never changed; typer reads the default as "none given")
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    dtype: flags.Dtype = "auto",
    device: flags.Device = "auto",
    revision: flags.Revision = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = 64,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = 2048,
    kv_cache_memory: flags.KvCacheMemory = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = None,
    swap_space: flags.SwapSpace = 0.0,
    quantization: flags.Quantization = None,
    enforce_eager: flags.EnforceEager = False,
    num_threads: flags.NumThreads = 0,
    tensor_parallel_size: flags.TensorParallelSize = 1,
    generation_config: flags.GenerationConfig = "auto",
    enable_lora: flags.EnableLora = False,
    lora_modules: flags.LoraModules = [],  # noqa: B006
    max_lora_rank: flags.MaxLoraRank = DEFAULT_MAX_LORA_RANK,
    max_loras: flags.MaxLoras = DEFAULT_MAX_LORAS,
    enable_prompt_adapter: flags.EnablePromptAdapter = False,
    prompt_adapters: flags.PromptAdapters = [],  # noqa: B006
    max_prompt_adapters: flags.MaxPromptAdapters = DEFAULT_MAX_PROMPT_ADAPTERS,
    max_prompt_adapter_token: flags.MaxPromptAdapterToken = DEFAULT_MAX_PROMPT_ADAPTER_TOKEN,
    max_waiting_requests: flags.MaxWaitingRequests = 4096,
    max_waiting_tokens: flags.MaxWaitingTokens = 4 * 2**20,
    queue_timeout: flags.QueueTimeout = 600.0,
    scheduling_policy: flags.SchedulingPolicy = "fcfs",
    enable_prefix_caching: flags.EnablePrefixCaching = True,
    enable_prompt_embeds: flags.EnablePromptEmbeds = False,
    strict: flags.Strict = False,
    max_requests_per_minute: flags.MaxRequestsPerMinute = 0,
    enable_auto_tool_choice: flags.EnableAutoToolChoice = False,
    tool_call_parser: flags.ToolCallParser = [],  # noqa: B006
    api_key: flags.ApiKey = None,
    log_level: flags.LogLevel = "info",
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
    loras = parse_adapters(lora_modules, served)
    soft_prompts = parse_adapters(prompt_adapters, served, taken=[module.name for module in loras])
    if loras and not enable_lora:
        raise ConfigurationError("--lora-modules needs --enable-lora")
    if soft_prompts and not enable_prompt_adapter:
        raise ConfigurationError("--prompt-adapters needs --enable-prompt-adapter")
    adapter_flags: tuple[str, ...] = ()
    if enable_lora:
        adapter_flags += ("--enable-lora", *command_flags(max_lora_rank=max_lora_rank, max_loras=max_loras))
    if enable_prompt_adapter:
        limits = command_flags(
            max_prompt_adapters=max_prompt_adapters, max_prompt_adapter_token=max_prompt_adapter_token
        )
        adapter_flags += ("--enable-prompt-adapter", *limits)
    parsers = parse_tool_parsers(tool_call_parser, [model.name for model in served], is_enabled=enable_auto_tool_choice)
    tool_flags: tuple[str, ...] = ("--enable-auto-tool-choice",) if parsers else ()
    tool_flags += tuple(part for text in tool_call_parser for part in ("--tool-call-parser", text))
    check_api_key(api_key)
    configure_logging("supervisor", log_level)
    config = ServeConfig(
        models=served,
        host=host,
        port=port,
        api_key=api_key,
        log_level=log_level,
        engine_flags=(
            *command_flags(
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
                tensor_parallel_size=tensor_parallel_size,
                generation_config=generation_config,
            ),
            *(("--enforce-eager",) if enforce_eager else ()),
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
        adapter_flags=adapter_flags,
        lora_modules=loras,
        prompt_adapters=soft_prompts,
        revision=revision,
        gateway_flags=(
            "--enable-prompt-embeds" if enable_prompt_embeds else "--no-enable-prompt-embeds",
            "--strict" if strict else "--no-strict",
            *command_flags(max_requests_per_minute=max_requests_per_minute),
            *tool_flags,
        ),
        started_at=context.obj,
    )
    raise typer.Exit(serve_all(config))


@app.command()
def gateway(
    model: flags.Routes,
    tokenizer: flags.TokenizerAddress,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    api_key: flags.ApiKey = None,
    drain_timeout: flags.DrainTimeout = 5.0,
    enable_prompt_embeds: flags.EnablePromptEmbeds = False,
    strict: flags.Strict = False,
    max_requests_per_minute: flags.MaxRequestsPerMinute = 0,
    enable_auto_tool_choice: flags.EnableAutoToolChoice = False,
    tool_call_parser: flags.ToolCallParser = [],  # noqa: B006
    log_level: flags.LogLevel = "info",
) -> None:
    """Serve the OpenAI protocol over HTTP for models whose schedulers run elsewhere."""
    routes = parse_routes(model)
    parsers = parse_tool_parsers(tool_call_parser, routes, is_enabled=enable_auto_tool_choice)
    check_api_key(api_key)
    config = GatewayConfig(
        api_key=api_key,
        enable_prompt_embeds=enable_prompt_embeds,
        strict=strict,
        max_requests_per_minute=max_requests_per_minute,
        drain_timeout_s=drain_timeout,
        tool_parsers=parsers,
    )

    async def run(stop: asyncio.Event) -> None:
        from trivium_gateway.app import serve as serve_gateway

        await serve_gateway(models=routes, tokenizer=tokenizer, host=host, port=port, config=config, stop=stop)

    preload = ("trivium_gateway.app",)
    end_process(run_service("gateway", run, preload=preload, log_level=log_level, is_traced=True))


@app.command()
def tokenizer(
    models: flags.Models, listen: flags.Listen, revision: flags.Revision = None, log_level: flags.LogLevel = "info"
) -> None:
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
    model: flags.SchedulerModel,
    executor: flags.ExecutorAddress,
    tokenizer: flags.TokenizerAddress,
    listen: flags.Listen,
    max_waiting_requests: flags.MaxWaitingRequests = 4096,
    max_waiting_tokens: flags.MaxWaitingTokens = 4 * 2**20,
    queue_timeout: flags.QueueTimeout = 600.0,
    scheduling_policy: flags.SchedulingPolicy = "fcfs",
    enable_prefix_caching: flags.EnablePrefixCaching = True,
    max_plans_in_flight: flags.MaxPlansInFlight = None,
    log_level: flags.LogLevel = "info",
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
    model: flags.Model,
    listen: flags.Listen,
    dtype: flags.Dtype = "auto",
    device: flags.Device = "auto",
    revision: flags.Revision = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = 64,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = 2048,
    kv_cache_memory: flags.KvCacheMemory = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = None,
    swap_space: flags.SwapSpace = 0.0,
    quantization: flags.Quantization = None,
    enforce_eager: flags.EnforceEager = False,
    num_threads: flags.NumThreads = 0,
    num_local_executors: flags.NumLocalExecutors = 1,
    tensor_parallel_size: flags.TensorParallelSize = 1,
    generation_config: flags.GenerationConfig = "auto",
    enable_lora: flags.EnableLora = False,
    lora_modules: flags.LoraModules = [],  # noqa: B006
    max_lora_rank: flags.MaxLoraRank = DEFAULT_MAX_LORA_RANK,
    max_loras: flags.MaxLoras = DEFAULT_MAX_LORAS,
    enable_prompt_adapter: flags.EnablePromptAdapter = False,
    prompt_adapters: flags.PromptAdapters = [],  # noqa: B006
    max_prompt_adapters: flags.MaxPromptAdapters = DEFAULT_MAX_PROMPT_ADAPTERS,
    max_prompt_adapter_token: flags.MaxPromptAdapterToken = DEFAULT_MAX_PROMPT_ADAPTER_TOKEN,
    log_level: flags.LogLevel = "info",
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
        enforce_eager=enforce_eager,
        num_threads=num_threads,
        num_local_executors=num_local_executors,
        tensor_parallel_size=tensor_parallel_size,
        generation_config=generation_config,
        enable_lora=enable_lora,
        lora_modules=parse_adapters(lora_modules, [served]),
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
        enable_prompt_adapter=enable_prompt_adapter,
        prompt_adapters=parse_adapters(prompt_adapters, [served]),
        max_prompt_adapters=max_prompt_adapters,
        max_prompt_adapter_token=max_prompt_adapter_token,
    )

    async def run(stop: asyncio.Event) -> None:
        from trivium.executor.server import serve as serve_executor

        await serve_executor(config, listen, stop)

    wait_passively()
    name, preload = f"executor {served.name}", ("trivium.executor.server",)
    end_process(run_service(name, run, preload=preload, log_level=log_level))


if __name__ == "__main__":
    sys.exit(main())
