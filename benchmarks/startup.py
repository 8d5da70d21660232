"""From `trivium serve` to ready with the bundled models, several times: python benchmarks/startup.py [RUNS]

Also prints the seconds of `trivium --help`. Starts real processes on loopback and ends them.
"""

import contextlib
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

_TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[int]:
    """The port of a `trivium serve` that is ready. Raises RuntimeError if it ends or takes too long."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "trivium", "serve", "--port", str(port), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while not is_ready(port):
            if server.poll() is not None:
                raise RuntimeError(f"trivium serve exited with {server.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"trivium serve was not ready after {_TIMEOUT_S} s")
            time.sleep(0.02)
        yield port
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(10)


def seconds_to_ready() -> float:
    begin = time.monotonic()
    with serving():
        return time.monotonic() - begin


def seconds_to_first_token(model: str, prompt: list[int]) -> float:
    """Of a server that starts with the checkpoint `model`, over HTTP."""
    begin = time.monotonic()
    with serving(f"served={model}") as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        body = {"model": "served", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"trivium serve answered {answer.status}: {text[:200]!r}")
        return time.monotonic() - begin


def seconds_of_help() -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-P", "-m", "trivium", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def report(name: str, seconds: list[float]) -> None:
    print(f"{name}: median {statistics.median(seconds):.2f} s, min {min(seconds):.2f}, max {max(seconds):.2f}")


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    report("trivium serve to ready, both bundled models", [seconds_to_ready() for _ in range(runs)])
    report("trivium --help", [seconds_of_help() for _ in range(runs)])
