"""`trivium serve`: all processes of a server on one machine, joined by Unix sockets in a private directory.

Owns the child processes: starts them all at once (each waits for its peers by itself), restarts what crashes, stops
them in drain order. Knows their command lines and exit codes, never their protocols; stays light, so it imports
neither torch nor grpc. The children watch a pipe of which this process holds the only write end, so nothing outlives
it, not even after `kill -9`.

Order of side effects: port check, socket directory, pipe, children, ready block; at the end children in stages,
whatever is left by SIGKILL, pipe, directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from trivium import __version__
from trivium.config import AdapterModule, ServedModel
from trivium.errors import ConfigurationError
from trivium.process import EXIT_CONFIGURATION, EXIT_FAILURE, EXIT_OK, PARENT_FD, RUNTIME_DIR

logger = logging.getLogger(__name__)

API_KEY = "TRIVIUM_API_KEY"
GATEWAY_DRAIN_S = 0.8  # what Ctrl-C leaves to running requests; less than the gateway's stage of `Timings`
MAX_RUNTIME_DIR_BYTES = 96  # a Unix socket path has at most 107 bytes, ours are `/s` and a number below it


class StopStage(IntEnum):
    """The order in which children are asked to end: whoever sends work first, whoever does it last."""

    GATEWAY = 0
    SCHEDULER = 1
    BACKEND = 2


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep alive. `env` is added to this process's own environment; None removes a variable."""

    name: str
    argv: tuple[str, ...]
    stop_stage: StopStage
    env: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All waiting times of a supervisor.

    stop_deadlines_s: by stop stage, how long after the begin of the stop its children may go on before the next stage
    is asked too; at the last one, whatever is left is killed. What one stage does not need is there for the others.
    """

    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    healthy_after_s: float = 30.0
    ready_poll_s: float = 0.1
    stop_deadlines_s: tuple[float, float, float] = (1.2, 1.8, 2.5)
    kill_grace_s: float = 0.4
    max_start_attempts: int = 3


class _Child:
    """State of one child; owned by its supervisor."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.keeper: asyncio.Task[None] | None = None

    def signal(self, number: signal.Signals) -> None:
        """SIGKILL goes to the child's whole process group, everything else to the child alone."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                # Popen.send_signal would poll, and so take the exit status from the thread that waits for it.
                os.kill(self.process.pid, number)


class Supervisor:
    """Keeps `children` running until `run`'s `stop` is set, then stops them. One instance runs once.

    Until `is_ready` has answered true once, the server is starting: a child that exits with 2 (it has printed its one
    line) ends everything with 2, and one that fails `max_start_attempts` times ends everything with 1. Later, a child
    that ends for whatever reason is restarted with exponential backoff and the others are left alone.
    """

    def __init__(
        self,
        children: Sequence[ChildSpec],
        *,
        is_ready: Callable[[], Awaitable[bool]],
        on_ready: Callable[[], None],
        runtime_dir: str | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._children = [_Child(spec) for spec in children]
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._runtime_dir = runtime_dir
        self._timings = timings or Timings()
        self._started = False
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._exit_code = EXIT_OK

    async def run(self, stop: asyncio.Event) -> int:
        """Run until `stop` is set or the start has failed; returns the exit code once no child is left."""
        parent_fd, write_fd = os.pipe()
        try:
            async with asyncio.TaskGroup() as tasks:
                for child in self._children:
                    child.keeper = tasks.create_task(self._keep(child, parent_fd))
                announcer = tasks.create_task(self._announce())
                stopper = tasks.create_task(self._end_when_set(stop))
                await self._ended.wait()
                announcer.cancel()
                stopper.cancel()
                if self._exit_code != EXIT_OK:
                    self.kill()  # the start has failed: there is nothing to drain
                await self._stop_children()
        finally:
            self.kill()
            os.close(write_fd)
            os.close(parent_fd)
        return self._exit_code

    def kill(self) -> None:
        """SIGKILL whatever still runs."""
        for child in self._children:
            child.signal(signal.SIGKILL)

    def pids(self) -> dict[str, int]:
        """name -> process id of every child that runs now."""
        return {
            child.spec.name: child.process.pid
            for child in self._children
            if child.process is not None and child.process.returncode is None
        }

    def _end(self, exit_code: int) -> None:
        if not self._ended.is_set():
            self._exit_code = exit_code
            self._ended.set()

    async def _end_when_set(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._end(EXIT_OK)

    async def _announce(self) -> None:
        """The only polling here: a gateway tells that it is ready over HTTP, which has no way to wait for it."""
        while not await self._is_ready():
            await asyncio.sleep(self._timings.ready_poll_s)
        self._started = True
        self._on_ready()

    async def _keep(self, child: _Child, parent_fd: int) -> None:
        """Run one child again and again until the supervisor stops."""
        name, timings = child.spec.name, self._timings
        backoff_s, failed_starts = timings.first_backoff_s, 0
        while not self._stopping.is_set():
            spawned_at = time.monotonic()
            exit_code = await self._run_once(child, parent_fd)
            uptime_s = time.monotonic() - spawned_at
            if self._ended.is_set():
                return
            if not self._started:
                failed_starts += 1
                if exit_code == EXIT_CONFIGURATION:
                    self._end(EXIT_CONFIGURATION)
                    return
                if failed_starts == timings.max_start_attempts:
                    logger.error("%s %s; gave up after %d starts", name, _describe(exit_code), failed_starts)
                    self._end(EXIT_FAILURE)
                    return
            if uptime_s >= timings.healthy_after_s:
                backoff_s = timings.first_backoff_s
            logger.warning(
                "%s %s after %.1f s; restarting it in %.1f s", name, _describe(exit_code), uptime_s, backoff_s
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, timings.max_backoff_s)

    async def _run_once(self, child: _Child, parent_fd: int) -> int:
        """Start the child and wait for its end; returns its exit code, negative for a signal.

        The child gets a session of its own: Ctrl-C reaches the supervisor only, which then drains in order. It
        inherits stderr, so that log lines and the progress bars of weight loading appear as the child writes them;
        stdout is kept for the ready block.
        """
        environment = {**os.environ, **child.spec.env, PARENT_FD: str(parent_fd), RUNTIME_DIR: self._runtime_dir}
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                pass_fds=(parent_fd,),
                start_new_session=True,
                env={key: value for key, value in environment.items() if value is not None},
            )
        except OSError as error:
            logger.error("%s cannot be started: %s", child.spec.name, error.strerror)
            return EXIT_FAILURE
        if self._stopping.is_set():
            child.signal(signal.SIGKILL)
        exit_code = await child.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)  # its helpers, if it left any
        return exit_code

    async def _stop_children(self) -> None:
        """SIGTERM stage by stage, SIGKILL for whatever has not ended in time."""
        self._stopping.set()
        began_at = time.monotonic()
        keepers = {child.keeper for child in self._children if child.keeper is not None}
        for stage in StopStage:
            members = [child for child in self._children if child.spec.stop_stage is stage]
            for child in members:
                child.signal(signal.SIGTERM)
            # the last stage also waits for the stragglers of the ones before
            awaited = keepers if stage is max(StopStage) else {child.keeper for child in members if child.keeper}
            if awaited:
                deadline = began_at + self._timings.stop_deadlines_s[stage]
                await asyncio.wait(awaited, timeout=max(0.0, deadline - time.monotonic()))
        if any(not keeper.done() for keeper in keepers):
            logger.warning("killing what did not stop in time: %s", ", ".join(self.pids()))
            self.kill()
            await asyncio.wait(keepers, timeout=self._timings.kill_grace_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What `trivium serve` was asked for.

    port 0 takes a free one. `engine_flags` and `adapter_flags` go to every executor as they are, `scheduler_flags` to
    every scheduler, `gateway_flags` to the gateway, each of `lora_modules` and `prompt_adapters` to the executor of its
    base. `revision` is of every hub model's tokenizer. `started_at` is the monotonic time from which the start is
    counted.
    """

    models: tuple[ServedModel, ...]
    host: str
    port: int
    api_key: str | None = None
    log_level: str = "info"
    engine_flags: tuple[str, ...] = ()
    scheduler_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    adapter_flags: tuple[str, ...] = ()
    lora_modules: tuple[AdapterModule, ...] = ()
    prompt_adapters: tuple[AdapterModule, ...] = ()
    revision: str | None = None
    started_at: float = 0.0


def serve(config: ServeConfig) -> int:
    """Run a whole server in the foreground; returns the exit code. Raises ConfigurationError before any child starts.

    SIGTERM, SIGINT and SIGHUP stop it in order; a second one kills the children at once.
    """
    config = replace(config, port=claim_port(config.host, config.port))

    def announce() -> None:
        print(ready_block(config, time.monotonic() - config.started_at), flush=True)

    async def is_ready() -> bool:
        return await gateway_is_ready(config.host, config.port)

    async def run(runtime_dir: str) -> int:
        children = build_children(config, runtime_dir)
        supervisor = Supervisor(children, is_ready=is_ready, on_ready=announce, runtime_dir=runtime_dir)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if stop.is_set():
                supervisor.kill()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, interrupt)
        return await supervisor.run(stop)

    runtime_dir = _make_runtime_dir()
    try:
        return asyncio.run(run(runtime_dir))
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


def build_children(config: ServeConfig, runtime_dir: str) -> tuple[ChildSpec, ...]:
    """One scheduler and one executor per model, one tokenizer and one gateway for all.

    The API key travels by environment, where a process list does not show it, and to the gateway alone.
    """
    log_level = ("--log-level", config.log_level)
    sources = [f"{model.name}={model.source}" for model in config.models]
    revision = () if config.revision is None else ("--revision", config.revision)
    tokenizer = f"unix:{runtime_dir}/t"
    schedulers = [f"unix:{runtime_dir}/s{index}" for index in range(len(config.models))]

    def child(name: str, stop_stage: StopStage, *arguments: str, api_key: str | None = None) -> ChildSpec:
        argv = (sys.executable, "-P", "-m", "trivium", *arguments, *log_level)
        return ChildSpec(name, argv, stop_stage, env={API_KEY: api_key})

    children = []
    for index, (model, source) in enumerate(zip(config.models, sources, strict=True)):
        executor = f"unix:{runtime_dir}/e{index}"
        flags: tuple[str, ...] = (
            "--listen",
            executor,
            "--num-local-executors",
            str(len(config.models)),
            *config.engine_flags,
        )
        flags += (*config.adapter_flags, *_module_flags(config, model.name))
        children.append(child(f"executor {model.name}", StopStage.BACKEND, "executor", source, *flags))
        where = ("--executor", executor, "--tokenizer", tokenizer, "--listen", schedulers[index])
        flags = (*where, *config.scheduler_flags)
        children.append(
            child(f"scheduler {model.name}", StopStage.SCHEDULER, "scheduler", "--model", model.name, *flags)
        )
    children.append(child("tokenizer", StopStage.BACKEND, "tokenizer", *sources, "--listen", tokenizer, *revision))
    routes = [
        flag
        for model, address in zip(config.models, schedulers, strict=True)
        for flag in ("--model", f"{model.name}={address}")
    ]
    flags = ("--host", config.host, "--port", str(config.port), "--drain-timeout", str(GATEWAY_DRAIN_S))
    flags += config.gateway_flags
    children.append(
        child(
            "gateway", StopStage.GATEWAY, "gateway", *routes, "--tokenizer", tokenizer, *flags, api_key=config.api_key
        )
    )
    return tuple(children)


def _module_flags(config: ServeConfig, base: str) -> tuple[str, ...]:
    return tuple(
        part
        for flag, modules in (("--lora-modules", config.lora_modules), ("--prompt-adapters", config.prompt_adapters))
        for module in modules
        if module.base == base
        for part in (flag, json.dumps({"name": module.name, "path": module.source}))
    )


def claim_port(host: str, port: int) -> int:
    """The port to use, having shown that it can be bound now. Raises ConfigurationError if it cannot.

    It is free again on return; the gateway checks once more when it binds, after the models have begun to load.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error


async def gateway_is_ready(host: str, port: int) -> bool:
    """True if the gateway answers its readiness route with 200."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(_reachable(host), port)
            try:
                writer.write(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return (await reader.readline()).split(b" ")[1:2] == [b"200"]
            finally:
                writer.close()
    except OSError:  # TimeoutError too
        return False


def ready_block(config: ServeConfig, seconds: float) -> str:
    """What `trivium serve` prints when it can answer: where, which models, how long it took, and a line to paste."""
    host = _reachable(config.host)
    adapters = [module.name for module in (*config.lora_modules, *config.prompt_adapters)]
    names = [model.name for model in config.models] + adapters
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}/v1"
    body = json.dumps({"model": config.models[0].name, "prompt": "Hello", "max_tokens": 32})
    key = ' -H "Authorization: Bearer $TRIVIUM_API_KEY"' if config.api_key is not None else ""
    return "\n".join(
        (
            f"Trivium {__version__} is ready after {seconds:.1f} s",
            f"  URL     {url}",
            f"  models  {', '.join(names)}",
            f"  try     curl {url}/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
        )
    )


def _make_runtime_dir() -> str:
    """A new directory, open to this user only, with a path that leaves room for socket names."""
    runtime_dir = tempfile.mkdtemp(prefix="trivium-")
    if len(os.fsencode(runtime_dir)) > MAX_RUNTIME_DIR_BYTES:
        os.rmdir(runtime_dir)
        runtime_dir = tempfile.mkdtemp(prefix="trivium-", dir="/tmp")
    return runtime_dir


def _reachable(host: str) -> str:
    """The address under which this machine reaches what listens on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"was ended by signal {-exit_code}"
