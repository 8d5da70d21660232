"""Ranks as real processes: they say what one says, and when one of them is lost, all end at once and tell why."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tiny import save_tiny
from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.model_runner import ModelRunner
from trivium.executor.parallel.calls import config_from_bytes, config_to_bytes
from trivium.executor.parallel.frames import Call, read_call, write_call
from trivium.executor.parallel.leading_runner import LeadingRunner, open_runner
from trivium.executor.parallel.ranks import RankLostError, Ranks, why_lost
from trivium.executor.plan_check import PlanError
from trivium.step import SchedulerOutput
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import assert_same, outputs_of

pytestmark = pytest.mark.xdist_group("ranks")
SOON_S = 20.0  # on a busy machine; it takes milliseconds, and importing torch a second or two


class Started:
    """Two ranks, and the news of their loss."""

    def __init__(self) -> None:
        self.losses: list[Exception] = []
        self.is_lost = threading.Event()
        self.ranks = Ranks(2, name="test", device=torch.device("cpu"), on_lost=self._on_lost)
        self.process = psutil.Process(self.ranks.pids[0])

    def wait_lost(self) -> Exception:
        assert self.is_lost.wait(SOON_S)
        (loss,) = self.losses
        return loss

    def _on_lost(self, error: Exception) -> None:
        self.losses.append(error)
        self.is_lost.set()


@pytest.fixture(scope="module")
def pair() -> Iterator[Started]:
    """They load one model after the other. The last test loses them."""
    started = Started()
    yield started
    started.ranks.close()
    assert not started.losses and not started.process.is_running()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def make_config(path: Path, **settings: Any) -> ExecutorConfig:
    defaults: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_memory_bytes": 8 * 2**20, "block_size": 4}
    return ExecutorConfig(model=str(path), served_model_name="tiny", num_threads=1, **{**defaults, **settings})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bart", "t5_gated"])
def test_two_processes_say_what_one_says(family: str, pair: Started, tmp_path: Path) -> None:
    config = make_config(save_tiny(family, tmp_path))
    assert_same(outputs_of(LeadingRunner(config, pair.ranks)), outputs_of(ModelRunner(config)))


def test_a_refused_plan_is_refused_by_all_and_they_go_on(pair: Started, checkpoint: Path) -> None:
    runner = LeadingRunner(make_config(checkpoint), pair.ranks)
    with pytest.raises(PlanError):
        runner.execute(SchedulerOutput(1, scheduled_slots=(3,), num_scheduled_tokens=(1,)))
    expected = outputs_of(ModelRunner(make_config(checkpoint)))
    assert_same(outputs_of(runner), expected)
    scheduler = MiniScheduler(runner)
    scheduler.add([5, 6, 7])
    scheduler.step()
    runner.reset()  # as a new scheduler does, in the middle of a request
    assert_same(outputs_of(runner), expected)


def test_an_adapter_that_cannot_be_loaded_is_refused_by_all_and_they_go_on(
    pair: Started, checkpoint: Path, tmp_path: Path
) -> None:
    runner = LeadingRunner(make_config(checkpoint, enable_lora=True), pair.ranks)
    with pytest.raises(ConfigurationError, match="adapter 'a'"):
        runner.load_adapter("a", str(tmp_path))
    assert_same(outputs_of(runner), outputs_of(ModelRunner(make_config(checkpoint))))


def test_nothing_listens_beyond_this_machine_and_nothing_is_left_in_files(pair: Started, checkpoint: Path) -> None:
    LeadingRunner(make_config(checkpoint), pair.ranks)
    processes = (psutil.Process(), pair.process)
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}
    assert not [file for file in pair.process.open_files() if "trivium-ranks" in file.path]
    rendezvous = pair.process.cmdline()[-4]
    assert rendezvous.endswith("rendezvous") and not os.path.exists(os.path.dirname(rendezvous))


def test_a_model_that_a_rank_cannot_load_is_a_wrong_setting(checkpoint: Path) -> None:
    started = Started()
    broken = make_config(checkpoint.parent / "nowhere")
    started.ranks.call(Call.LOAD, config_to_bytes(broken))
    with pytest.raises(ConfigurationError, match="nowhere does not exist"):
        started.ranks.communicator.gather(torch.zeros(1))  # waits for a rank that will not come
    assert isinstance(started.wait_lost(), ConfigurationError)
    started.ranks.close()


@pytest.mark.parametrize(
    ("exit_code", "report", "kind", "message"),
    [
        (-9, b"", RankLostError, "rank 3 was ended by SIGKILL"),
        (-63, b"", RankLostError, "rank 3 was ended by signal 63"),
        (2, b'"no such model"', ConfigurationError, "no such model"),
        (1, b"", RuntimeError, "rank 3 failed with code 1"),
        (0, b"", RuntimeError, "rank 3 failed with code 0"),
    ],
)
def test_an_exit_code_says_whose_fault_the_end_of_a_rank_was(
    exit_code: int, report: bytes, kind: type[Exception], message: str
) -> None:
    error = why_lost(3, report, exit_code)
    assert type(error) is kind and str(error) == message


def test_a_model_that_cannot_be_split_is_refused_at_once_and_leaves_no_rank(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(ConfigurationError, match="tensor_parallel_size 4 does not divide the model's 6 attention"):
        open_runner(make_config(checkpoint, tensor_parallel_size=4), on_lost=lambda error: None)
    assert set(psutil.Process().children()) <= before and not caplog.records


def test_a_call_that_nobody_reads_is_given_up() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    write_call(write_end, Call.RESET, b"", 0.1)
    with pytest.raises(TimeoutError, match=r"nobody has read a call for 0\.1 s"):
        write_call(write_end, Call.PLAN, bytes(2**20), 0.1)
    os.close(read_end)
    with pytest.raises(BrokenPipeError):
        write_call(write_end, Call.RESET, b"", 0.1)
    os.close(write_end)


def test_calls_arrive_whole_and_in_order_however_large_they_are() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    sent = [(Call.RESET, b""), (Call.PLAN, bytes(range(256)) * 4096), (Call.EMBED, b"x")]
    found = []
    with os.fdopen(read_end, "rb") as stream:
        reader = threading.Thread(target=lambda: found.extend(iter(lambda: read_call(stream), None)))
        reader.start()
        for call, arguments in sent:
            write_call(write_end, call, arguments, 5.0)
        os.write(write_end, b"\x02")  # the beginning of one that does not come
        os.close(write_end)
        reader.join(5)
    assert found == sent


def test_a_config_travels_whole() -> None:
    config = make_config(Path("x"), override_generation_config={"eos_token_id": [1, 2]}, tensor_parallel_size=2)
    assert config_from_bytes(config_to_bytes(config)) == config
    with pytest.raises(ConfigurationError, match="override_generation_config: Object of type set"):
        config_to_bytes(replace(config, override_generation_config={"eos_token_id": {1}}))


def test_a_rank_that_does_not_answer_ends_all_after_a_time(
    pair: Started, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivium.executor.parallel.leading_runner.STEP_TIMEOUT_S", 1.0)
    runner = LeadingRunner(make_config(checkpoint), pair.ranks)
    pair.process.send_signal(signal.SIGSTOP)
    began_at = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        outputs_of(runner)
    assert time.monotonic() - began_at < SOON_S
    assert not pair.process.is_running()
    with pytest.raises(RuntimeError, match="the ranks have ended"):
        outputs_of(runner)
