"""What every service process does around its `serve` coroutine: logging, signals, exit codes, no life as an orphan.

Knows no service and never imports torch or grpc itself. Order of side effects in `run_service`: logging, signal
handlers, the watch over the supervisor, the heavy imports, tracing, the event loop. A process that dies before the
event loop runs has created nothing, so until then a signal simply ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from types import FrameType
from typing import NoReturn

from trivium.errors import ConfigurationError

logger = logging.getLogger(__name__)

Serve = Callable[[asyncio.Event], Awaitable[None]]

PARENT_FD = "TRIVIUM_PARENT_FD"  # read end of a pipe whose only write end the supervisor holds
RUNTIME_DIR = "TRIVIUM_RUNTIME_DIR"  # the supervisor's private directory of Unix sockets

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIGURATION = 2


def configure_logging(name: str, level: str = "info") -> None:
    """Log to stderr as `time level [name] message`. Libraries stay at warning unless `level` is stricter."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(
        level=max(number, logging.WARNING),
        format=f"%(asctime)s %(levelname)s [{name.replace('%', '%%')}] %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for package in ("trivium", "trivium_gateway", "trivium_kernels"):
        logging.getLogger(package).setLevel(number)


def run_service(
    name: str, serve: Serve, *, preload: Sequence[str] = (), log_level: str = "info", is_traced: bool = False
) -> int:
    """Run `serve(stop)` to its end and return the exit code of the process.

    `stop` is set by SIGTERM or SIGINT; a second SIGINT ends the process at once. `preload` names the modules that
    `serve` needs: they are imported before the event loop exists, where nothing waits for them. `is_traced` says that
    the service makes spans; the first word of `name` is then its name.
    Exit codes: 0 after a normal end, 2 after a ConfigurationError (one line on stderr), 1 after any other exception
    (traceback in the log).
    """
    configure_logging(name, log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)
    try:
        watch_parent()
        for module in preload:
            importlib.import_module(module)
        with _tracing(name.split()[0]) if is_traced else contextlib.nullcontext():
            gc.collect()
            gc.freeze()  # what the imports left is never garbage: full collections need not look at it again
            with asyncio.Runner(loop_factory=_new_event_loop) as runner:
                runner.run(_serve_until_signal(serve))
    except Exception as error:
        configuration_error = find_configuration_error(error)
        if configuration_error is None:
            logger.exception("%s failed", name)
            return EXIT_FAILURE
        print_error(configuration_error.message)
        return EXIT_CONFIGURATION
    return EXIT_OK


def end_process(exit_code: int) -> NoReturn:
    """Leave without tearing the interpreter down.

    A service has closed what others can see by now. Taking a heap of imported libraries apart object by object took
    2.3 s of a 2.6 s stop, and a worker thread in the middle of a download would hold the exit for as long as it runs.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def wait_passively(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let idle OpenMP threads sleep after a moment of spinning, unless the user has said otherwise.

    Before torch is imported. The processes of a server share cores, so endless spinning takes them from the
    gateway; but a step has hundreds of parallel regions, and sleeping at once costs a wake-up in each of them: decoding
    8 rows of a 135M model on 2 cores went at 94 tokens/s without spinning, at 113 with 2000 turns, and with 20000.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "2000"), ("KMP_BLOCKTIME", "0")):
        environ.setdefault(name, value)


def waits_passively(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `wait_passively` was called, or the user wants the same."""
    return environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def print_error(message: str) -> None:
    """The one line on stderr that explains to the operator why nothing started."""
    print("trivium: error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def find_configuration_error(error: BaseException) -> ConfigurationError | None:
    """The ConfigurationError that `error` is, or that a task group wrapped into it."""
    if isinstance(error, ConfigurationError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := find_configuration_error(inner))), None)
    return None


def watch_parent(environ: MutableMapping[str, str] = os.environ) -> None:
    """End this process when its supervisor is gone, however it went.

    Without TRIVIUM_PARENT_FD there is nothing to watch. The variables are removed from `environ` and the descriptor
    is not inherited further: helpers of this process have this process for a parent.
    """
    text = environ.pop(PARENT_FD, None)
    runtime_dir = environ.pop(RUNTIME_DIR, None)
    if text is None:
        return
    try:
        parent_fd = int(text)
        os.set_inheritable(parent_fd, False)
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{PARENT_FD} must be an open file descriptor, got {text!r}") from error
    threading.Thread(target=_exit_at_eof, args=(parent_fd, runtime_dir), name="parent-watch", daemon=True).start()


def remove_sockets(directory: str) -> None:
    """Remove the Unix sockets in `directory`, and the directory itself if nothing else is in it. Never raises."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)
        os.rmdir(directory)


def _exit_at_eof(parent_fd: int, runtime_dir: str | None) -> None:
    """Block until the write end of the pipe closes, clean up, exit. Logs nothing: stderr may have lost its reader.

    Every orphan removes what it finds; one that binds its socket later reaches this point later, so the last one
    leaves an empty place.
    """
    while os.read(parent_fd, 1):
        pass
    if runtime_dir is not None:
        remove_sockets(runtime_dir)
    os._exit(EXIT_FAILURE)


@contextlib.contextmanager
def _tracing(service: str) -> Iterator[None]:
    from trivium.telemetry import setup_tracing, shutdown_tracing

    setup_tracing(service)
    try:
        yield
    finally:
        shutdown_tracing()


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


async def _serve_until_signal(serve: Serve) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if stop.is_set():
            os._exit(128 + signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    await serve(stop)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
