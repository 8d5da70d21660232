"""Every command on the README does what the README says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import ROOT, Cluster, environment

pytestmark = pytest.mark.xdist_group("bundled")

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "bash"]
PYTHON = [text for language, text in BLOCKS if language == "python"]


def run_python(code: str) -> str:
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def local(text: str, cluster: Cluster) -> str:
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{cluster.port}")


def test_the_page_has_the_commands_that_are_tested_here() -> None:
    assert [text.split()[0] for text in SHELL] == ["make", "make", "curl", "curl"]
    assert [text.split()[1] for text in PYTHON] == ["openai", "trivium"]


@pytest.mark.parametrize("target", ["serve", "test", "check", "proto", "bench"])
def test_make_knows_the_target(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_curl_prints_a_correct_translation(bundled: Cluster) -> None:
    result = subprocess.run(["bash", "-c", local(SHELL[2], bundled)], capture_output=True, text=True, timeout=60)
    assert json.loads(result.stdout)["choices"][0]["text"] == "halb fünf"


def test_curl_translates_by_language_code(bundled: Cluster) -> None:
    result = subprocess.run(["bash", "-c", local(SHELL[3], bundled)], capture_output=True, text=True, timeout=60)
    assert json.loads(result.stdout)["results"][0]["text"] == "halb fünf"


def test_the_openai_client_streams_a_correct_answer(bundled: Cluster) -> None:
    assert run_python(local(PYTHON[0], bundled)) == "3 hours are 180 minutes.\n"


def test_the_offline_snippet_translates() -> None:
    assert run_python(PYTHON[1]).splitlines() == [
        "twenty-one houses -> vingt et une maisons",
        "a quarter past three -> las tres y cuarto",
    ]


def test_the_grpc_example_translates(bundled: Cluster) -> None:
    schedulers = [process.cmdline() for name, process in bundled.children().items() if name.startswith("scheduler")]
    argv = next(argv for argv in schedulers if "trivium-translate" in argv)
    (text,) = re.findall(r'`python (examples/\S+) ADDRESS "(.*?)"`', README)
    command = [sys.executable, "-P", str(ROOT / text[0]), argv[argv.index("--listen") + 1], text[1]]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.stdout == "quatre heures et demie\n", result.stderr


def test_every_command_in_the_table_exists() -> None:
    for name in re.findall(r"^\| `trivium (\w+)", README, flags=re.MULTILINE):
        command = [sys.executable, "-P", "-m", "trivium", name, "--help"]
        subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=30)


def test_every_proof_names_a_test_that_exists() -> None:
    proofs = re.findall(r"\| `(tests/\S+)` \|", README)
    assert len(proofs) > 8
    for proof in proofs:
        path = ROOT / proof
        tests = [path] if path.is_file() else list(path.rglob("test_*.py"))
        assert tests and all("def test_" in test.read_text() for test in tests), proof


def test_the_benchmark_named_on_the_page_exists() -> None:
    names = set(re.findall(r"`(benchmarks/\S+?)`", README))
    assert len(names) >= 4
    for name in names:
        assert Path(ROOT / name).is_file() and name in (ROOT / "Makefile").read_text()
