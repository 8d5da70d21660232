"""From `trivium serve` to ready with the bundled models, several times: python benchmarks/startup.py [RUNS]

Also prints the seconds of `trivium --help`. Starts real processes on loopback and ends them.
"""

import http.client
import signal
import socket
import statistics
import subprocess
import sys
import time


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


def seconds_to_ready() -> float:
    port = free_port()
    begin = time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "trivium", "serve", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not is_ready(port):
            if server.poll() is not None:
                raise SystemExit(f"trivium serve exited with {server.returncode}")
            time.sleep(0.02)
        return time.monotonic() - begin
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(10)


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
