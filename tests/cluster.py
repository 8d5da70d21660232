"""Real processes on loopback: `trivium serve` as a user starts it, and what a test wants to do to it."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user who has installed the package and nothing else."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRIVIUM_")}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("services", "kernels", "gateway"))
    env["HF_HUB_OFFLINE"] = "1"
    return {**env, **extra}


def command(*args: str) -> list[str]:
    return [sys.executable, "-P", "-m", "trivium", *args]


class Cluster:
    """One `trivium serve`. Everything it starts is ended by `stop`, whatever happened."""

    def __init__(self, *args: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.log = log
        self.started_at = time.monotonic()
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command("serve", "--port", str(self.port), *args),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env or environment(),
                cwd=log.parent,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Cluster:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"serve exited with {self.process.returncode}:\n{self.log.read_text()}"
            if self.health("/health/ready") == 200:
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def health(self, path: str) -> int | None:
        """HTTP status of `path`, or None if nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def held_blocks(self) -> float | None:
        """KV blocks that requests hold, of all models; None if the gateway does not say."""
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer,
        ):
            lines = answer.read().decode().splitlines()
            values = [float(line.split()[-1]) for line in lines if line.startswith("trivium_scheduler_blocks_held{")]
            return sum(values) if values else None
        return None

    def assert_nothing_held(self, timeout_s: float = 20.0) -> None:
        """Every request is over: no block may be held, as soon as what was aborted has been told.

        A gateway that wants a key says nothing.
        """
        deadline = time.monotonic() + timeout_s
        while held := self.held_blocks():
            assert time.monotonic() < deadline, f"{held} blocks are held:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def children(self) -> dict[str, psutil.Process]:
        """service name ("executor", or "executor NAME" where there are several) -> its process."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                argv = process.cmdline()
                if "trivium" in argv:
                    kind = argv[argv.index("trivium") + 1]
                    found[kind if kind not in found else f"{kind} {process.pid}"] = process
        return found

    def kill(self, service: str) -> int:
        """SIGKILL one child; its process id."""
        process = self.children()[service]
        process.kill()
        return int(process.pid)

    def stop(self) -> None:
        everything = [self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            everything += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        for pid in everything:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serve(*args: str, log: Path, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster that is ready, and gone afterwards."""
    cluster = Cluster(*args, log=log, env=env)
    try:
        yield cluster.wait_ready()
        if cluster.process.poll() is None and cluster.health("/health/ready") == 200:
            cluster.assert_nothing_held()
    finally:
        cluster.stop()
