"""What cannot be served is refused in one line, quickly, and leaves what else is running alone."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from cluster import command, environment

pytestmark = pytest.mark.xdist_group("start")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), env=environment(), capture_output=True, text=True, timeout=60)


def broken(source: Path, target: Path, what: str) -> Path:
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    match what:
        case "no config":
            (target / "config.json").unlink()
        case "bad config":
            (target / "config.json").write_text("{")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "no weights":
            weights.unlink()
        case "unsupported architecture":
            config = json.loads((target / "config.json").read_text())
            config["architectures"] = ["MambaForCausalLM"]
            (target / "config.json").write_text(json.dumps(config))
        case "no tokenizer":
            for path in target.glob("tokenizer*"):
                path.unlink()
    return target


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no config", "config.json"),
        ("bad config", "config.json"),
        ("truncated weights", "model.safetensors"),
        ("no weights", "safetensors"),
        ("unsupported architecture", "MambaForCausalLM"),
        ("no tokenizer", "tokenizer"),
    ],
)
def test_a_broken_model_is_one_line(checkpoints: dict[str, Path], tmp_path: Path, what: str, says: str) -> None:
    path = broken(checkpoints["llama"], tmp_path / "model", what)
    result = run("serve", f"m={path}", "--port", "0")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and says in errors[0], result.stderr


def test_a_taken_port_is_one_line(checkpoints: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("serve", f"m={checkpoints['llama']}", "--port", port)
    assert result.returncode == 2 and port in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("serve", "--no-such-flag"),
        ("no-such-command",),
        ("serve", "/no/such/directory"),
        ("serve", "--kv-cache-memory", "lots"),
        ("executor", "x", "--listen", "nowhere"),
    ],
)
def test_a_wrong_command_line_is_explained(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.returncode == 2 and result.stderr.strip() and "Traceback" not in result.stderr
