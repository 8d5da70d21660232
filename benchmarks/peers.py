"""An engine in a process of its own (`worker.py`), with the environment that suits it.

So no engine spins on another's cores, shares an OpenMP runtime with it or has its CPU time counted with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import psutil

_WORKER = Path(__file__).parent / "worker.py"
_TIMEOUT_S = 900
_LOG_TAIL_BYTES = 4000

Prompts = Sequence[Sequence[int]]


class PeerError(Exception):
    """A peer cannot start here, has ended, does not answer or answers wrongly."""


@dataclass(frozen=True, slots=True)
class Answer:
    """value: tokens of `generate`, seconds of `serve`. cpu_seconds: of all threads of the peer's processes."""

    value: Any
    seconds: float
    cpu_seconds: float


class RequestLike(Protocol):
    """seconds: after the start. num_tokens: of the output; None if it ends by itself."""

    @property
    def seconds(self) -> float: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def num_tokens(self) -> int | None: ...


class Peer:
    """A context manager that owns the peer's process. Raises PeerError, and is closed then; `failure` says why.

    start_seconds: from the start of the process to a loaded model.
    """

    def __init__(
        self,
        name: str,
        engine: str,
        *,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.failure: str | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [python, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts: dict[str, str] = self._ask(engine=engine, **settings).value
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def generate(
        self, prompts: Prompts, num_tokens: int | None, *, num_beams: int = 1, max_batch: int = 0, num_shared: int = 0
    ) -> Answer:
        """New tokens for each prompt: exactly `num_tokens`, or as many as there come until EOS. See `engines.py`."""
        answer = self._ask(
            command="generate",
            prompts=prompts,
            num_tokens=None if num_tokens is None else [num_tokens] * len(prompts),
            num_beams=num_beams,
            max_batch=max_batch,
            num_shared=num_shared,
        )
        lengths = {len(output) for output in answer.value}
        if len(answer.value) != len(prompts) or (num_tokens is not None and lengths != {num_tokens}):
            given = f"{sorted(lengths)} tokens for {len(answer.value)} prompts"
            self._fail(f"gave {given}, not {num_tokens} for {len(prompts)}")
        return answer

    def serve(self, trace: Sequence[RequestLike], *, num_beams: int = 1, max_batch: int = 16) -> Answer:
        """Seconds after the start at which each request of `trace` was done."""
        requests = [(arrival.seconds, arrival.prompt, arrival.num_tokens) for arrival in trace]
        return self._ask(command="serve", trace=requests, num_beams=num_beams, max_batch=max_batch)

    def close(self) -> None:
        """End the process and what it has started."""
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            process.kill()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, **command: Any) -> Answer:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None, "both are pipes"
        if self.failure is not None:
            raise PeerError(f"{self.name}: {self.failure}")
        try:
            print(json.dumps(command), file=pipe_in, flush=True)
            is_ready, _, _ = select.select([pipe_out], [], [], _TIMEOUT_S)
            line = pipe_out.readline() if is_ready else ""
        except BrokenPipeError:
            is_ready, line = [pipe_out], ""
        if not line:
            self._fail(f"has ended: {self._last_words()}" if is_ready else f"gave no answer in {_TIMEOUT_S} s")
        return Answer(**json.loads(line))

    def _fail(self, reason: str) -> NoReturn:
        self.failure = reason
        self.close()
        raise PeerError(f"{self.name}: {reason}")

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "without a word")
