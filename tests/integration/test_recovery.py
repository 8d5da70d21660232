"""Kill any process behind the gateway: streams go on, nothing is lost or repeated, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from cluster import Cluster, serve
from streams import MAX_TOKENS, Stream, run_streams
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("recovery")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "llama"
    return save_tiny("llama", path, with_tokenizer=True, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serve(f"llama={checkpoint}", log=tmp_path_factory.mktemp("recovery") / "serve.log") as cluster:
        yield cluster


@pytest.mark.parametrize("service", ["executor", "scheduler", "tokenizer"])
def test_a_killed_process_is_a_pause_for_its_streams(cluster: Cluster, service: str) -> None:
    expected = run_streams(cluster)
    before = cluster.children()[service].pid
    assert run_streams(cluster, lambda: cluster.kill(service)) == expected
    assert cluster.children()[service].pid != before
    cluster.wait_ready()


def test_a_stream_that_goes_on_says_what_was_cached_when_it_began(cluster: Cluster) -> None:
    prompt = "asked once before, " * 5
    cold, warm = (Stream(cluster, prompt, temperature=0.0, max_tokens=count) for count in (2, MAX_TOKENS))
    cold.run()
    warm.start()
    assert warm.first.wait(60)
    cluster.kill("scheduler")  # the next one finds nothing cached
    warm.join(90)
    cluster.wait_ready()
    assert cold.error is None and cold.num_cached_tokens == 0
    assert warm.error is None and warm.finish_reason == "length"
    assert warm.num_cached_tokens == (len(prompt) - 1) // 16 * 16  # the last token is computed in any case


def test_a_client_that_leaves_frees_its_blocks(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        chunks = client.completions.create(
            model="llama", prompt="abc", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(chunks))
        chunks.close()
        # the pool has room for a few requests only if the one that was left is gone
        assert client.completions.create(model="llama", prompt="abc", max_tokens=100).choices[0].text


def runtime_dir(cluster: Cluster) -> Path:
    argv = cluster.children()["scheduler"].cmdline()
    return Path(argv[argv.index("--listen") + 1].removeprefix("unix:")).parent


def assert_gone(pids: list[int], folder: Path, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive and not folder.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: processes {alive}, folder exists: {folder.exists()}")


@pytest.mark.parametrize(("number", "within_s"), [(signal.SIGKILL, 5.0), (signal.SIGINT, 3.0), (signal.SIGTERM, 3.0)])
def test_the_end_of_the_supervisor_is_the_end_of_everything(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, within_s: float
) -> None:
    with serve(f"llama={checkpoint}", log=tmp_path / "serve.log") as cluster:
        folder = runtime_dir(cluster)
        pids = [process.pid for process in cluster.children().values()]
        assert len(pids) == 4 and len(list(folder.iterdir())) == 3
        stream = Stream(cluster, "abc", temperature=0.0)
        stream.start()
        assert stream.first.wait(60)
        os.kill(cluster.process.pid, number)
        if number is not signal.SIGKILL:
            try:
                assert cluster.process.wait(within_s) == 0
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {within_s} s:\n{cluster.log.read_text()}") from None
        else:
            cluster.process.wait(5)
        assert_gone(pids, folder, within_s)
        assert "Traceback" not in cluster.log.read_text()
