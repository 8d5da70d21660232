"""Refuses grammars that are wrong or take too long, before they get near an executor.

A thread that compiles cannot be stopped, and some grammars take for ever. So they are compiled in a process of their
own first, which is killed when its time is up; the next one starts at once. Run as a module, this file is that process:
it reads a vocabulary, then grammars, one JSON value per line, and answers each grammar with null or the reason to
refuse it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import psutil

from trivium.errors import EngineUnavailableError, InvalidRequestError, OverloadedError
from trivium.grammar import GrammarCompiler, GrammarVocabulary, refused
from trivium.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

MAX_COMPILE_S = 2.0
MAX_WAITING = 64
MAX_WAIT_S = 10.0  # for other grammars to be compiled
MAX_VERDICTS = 512
MAX_MEMORY_BYTES = 4 * 2**30
_LEAST_SHARE = 0.1  # of that time in CPU time, for a grammar to be too complex; ordinary ones take far less
_START_S = 30.0  # until a new process has read its vocabulary


class GrammarChecker:
    """For one tokenizer. Its process starts with the first grammar; one grammar is compiled at a time.

    vocabulary: called once, in a thread; it may raise InvalidRequestError.
    """

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], *, max_compile_s: float = MAX_COMPILE_S) -> None:
        self._load_vocabulary = vocabulary
        self._max_compile_s = max_compile_s
        self._vocabulary: bytes | None = None
        self._process: asyncio.Task[_Process] | None = None  # which starts it
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._is_closed = False
        # grammar -> why it is refused, if it is
        self._verdicts: OrderedDict[StructuredOutputsParams, InvalidRequestError | None] = OrderedDict()

    async def check(self, params: StructuredOutputsParams) -> None:
        """Raise InvalidRequestError, naming the parameter, unless `params` compiles in time; OverloadedError."""
        if params not in self._verdicts:
            if self._num_waiting >= MAX_WAITING:
                raise OverloadedError(f"{MAX_WAITING} grammars wait to be compiled")
            self._num_waiting += 1
            try:
                await self._take_turn()
                try:
                    if params not in self._verdicts:
                        self._verdicts[params] = await self._compile(params)
                finally:
                    self._turn.release()
            finally:
                self._num_waiting -= 1
        self._verdicts.move_to_end(params)
        error = self._verdicts[params]
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        if error is not None:
            raise type(error)(error.message, param=error.param, code=error.code)

    async def close(self) -> None:
        self._is_closed = True
        await self._end_process()

    async def _end_process(self) -> None:
        starting, self._process = self._process, None
        if starting is None:
            return
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, InvalidRequestError, EngineUnavailableError):
            process = await starting
            await asyncio.to_thread(process.end)

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise OverloadedError("too many grammars wait to be compiled") from None

    async def _compile(self, params: StructuredOutputsParams) -> InvalidRequestError | None:
        process = await self._running_process()
        began_s = process.cpu_seconds()
        try:
            async with asyncio.timeout(self._max_compile_s):
                reply: dict[str, str] | None = json.loads(await process.ask(json.dumps(asdict(params)).encode()))
        except TimeoutError:
            used_s = process.cpu_seconds() - began_s
            await self._replace_process()
            if used_s < _LEAST_SHARE * self._max_compile_s:  # that says nothing about the grammar
                raise OverloadedError("the machine is too busy to compile a grammar in time") from None
            logger.warning("a grammar took longer than %g s to compile", self._max_compile_s)
            reason = f"it is too complex: compiling takes longer than {self._max_compile_s:g} s"
            return refused(params, reason, "grammar_too_complex")
        except (OSError, json.JSONDecodeError):  # the process is gone: out of memory, or a bug of the compiler
            await self._replace_process()
            return refused(params, "it is too complex to compile", "grammar_too_complex")
        except asyncio.CancelledError:  # by the caller: an answer without a reader must not meet the next question
            await self._replace_process()
            raise
        return None if reply is None else InvalidRequestError(**reply)

    async def _running_process(self) -> _Process:
        """The process, with its vocabulary read.

        Raises EngineUnavailableError if it does not start, InvalidRequestError if there is no such vocabulary.
        """
        if self._process is not None and self._process.done() and not _is_alive(self._process):
            await self._end_process()
        if self._is_closed:
            raise EngineUnavailableError("the service is shutting down", code="draining")
        if self._process is None:
            self._process = asyncio.create_task(self._start())
        return await asyncio.shield(self._process)

    async def _replace_process(self) -> None:
        """The next grammar need not wait for the start of another one."""
        await self._end_process()
        if not self._is_closed:
            self._process = asyncio.create_task(self._start())

    async def _start(self) -> _Process:
        if self._vocabulary is None:
            self._vocabulary = _to_line(await asyncio.to_thread(self._load_vocabulary))
        spawning = asyncio.ensure_future(asyncio.to_thread(_Process))
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                (await spawning).end()  # it takes milliseconds, and a loop that ends would forget a callback
            raise
        except OSError as error:
            logger.error("the process that compiles grammars cannot be started: %s", error.strerror)
            raise _not_started() from None
        try:
            async with asyncio.timeout(_START_S):
                is_started = bool(await process.ask(self._vocabulary))
        except (TimeoutError, OSError):
            is_started = False
        except asyncio.CancelledError:
            process.end()
            raise
        if not is_started:
            process.end()
            raise _not_started()
        return process


def _not_started() -> EngineUnavailableError:
    return EngineUnavailableError("the process that compiles grammars did not start")


def _is_alive(starting: asyncio.Task[_Process]) -> bool:
    return not starting.cancelled() and starting.exception() is None and starting.result().is_alive


class _Process:
    """A process that runs `main`: one line of JSON in, one out. Owner: the GrammarChecker.

    Started by `subprocess`, which uses vfork, and waited for in threads: uvloop forks, and gRPC's handlers of forks now
    and then abort the child before it has begun (2 in 300 starts beside 8 busy channels).
    """

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "trivium.tokenizer.grammar_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def cpu_seconds(self) -> float:
        """What it has used so far; 0 if it has ended."""
        try:
            times = psutil.Process(self._popen.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    async def ask(self, line: bytes) -> bytes:
        """The answer to `line`, empty if the process has ended. Whoever stops waiting for it must call `end`."""
        return await asyncio.to_thread(self._exchange, line)

    def end(self) -> None:
        """Kill the process; a thread that waits for its answer gets an empty one."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None, "the process was started with pipes"
            with contextlib.suppress(OSError):  # what was not written yet
                pipe.close()

    def _exchange(self, line: bytes) -> bytes:
        assert self._popen.stdin is not None and self._popen.stdout is not None, "the pipes of the process are open"
        self._popen.stdin.write(line + b"\n")
        self._popen.stdin.flush()
        return self._popen.stdout.readline()


def _to_line(vocabulary: GrammarVocabulary) -> bytes:
    tokens = [base64.b64encode(token).decode() for token in vocabulary.tokens]
    return json.dumps({"tokens": tokens, "special_ids": vocabulary.special_ids}).encode()


def main() -> None:
    """The process. It ends with its input, or when one grammar has used more than its share of CPU time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends this process
    vocabulary: dict[str, Any] = json.loads(sys.stdin.readline())
    tokens = tuple(map(base64.b64decode, vocabulary["tokens"]))
    # No token ends anything here: the one after the last stands for it.
    compiler = GrammarCompiler(GrammarVocabulary((*tokens, b"<eos>"), tuple(vocabulary["special_ids"])), [len(tokens)])
    _answer(None)
    for line in sys.stdin:
        _limit()
        try:
            compiler.compile(StructuredOutputsParams(**json.loads(line)))
            _answer(None)
        except InvalidRequestError as error:
            _answer({"message": error.message, "param": error.param, "code": error.code})


def _limit() -> None:
    """Bound memory, and the CPU time until the next grammar: a parent that was killed kills nobody."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(used.ru_utime + used.ru_stime + MAX_COMPILE_S) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _answer(reply: dict[str, str | None] | None) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
