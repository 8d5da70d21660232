"""The supervisor over stub children that crash, hang, fail and hold sockets: real processes, real signals."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import typer

import trivium
from trivium import cli
from trivium.config import ServedModel
from trivium.errors import ConfigurationError
from trivium.supervisor import (
    ChildSpec,
    ServeConfig,
    StopStage,
    Supervisor,
    Timings,
    build_children,
    claim_port,
    gateway_is_ready,
    ready_block,
)

SOURCE_ROOT = str(Path(trivium.__file__).parents[1])
FAST = Timings(first_backoff_s=0.05, max_backoff_s=0.2, ready_poll_s=0.01)

SLEEP = "import time; time.sleep(60)"
IGNORE_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(LOG, 'a'); time.sleep(60)"
# a stub service: notes its start and its end in the file LOG, takes a moment to stop
NOTE = """
import signal, sys, time
def note(word):
    with open(LOG, "a") as file:
        file.write(f"{NAME} {word} {time.monotonic()}\\n")
def stop(number, frame):
    note("asked")
    time.sleep(0.15)
    note("ended")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("started")
while True:
    time.sleep(60)
"""


def stub(name: str, code: str, stage: StopStage = StopStage.BACKEND, log: Path | None = None) -> ChildSpec:
    """A child that runs `code`; it sees its name as NAME and a file of the test as LOG."""
    prologue = f"NAME = {name!r}; LOG = {str(log)!r}\n"
    return ChildSpec(name, (sys.executable, "-S", "-c", prologue + code), stage, env={"PYTHONPATH": SOURCE_ROOT})


async def always() -> bool:
    return True


async def never() -> bool:
    return False


def make_supervisor(
    *children: ChildSpec, is_ready: Callable[[], Awaitable[bool]] = always, timings: Timings = FAST
) -> Supervisor:
    return Supervisor(children, is_ready=is_ready, on_ready=lambda: None, timings=timings)


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[int]]:
    stop = asyncio.Event()
    task = asyncio.create_task(supervisor.run(stop))
    try:
        await until(lambda: bool(supervisor.pids()) or task.done())
        yield task
    finally:
        stop.set()
        await task


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def events(log: Path) -> list[tuple[str, str, float]]:
    """(name, event, time) of every note of the stubs, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(name, word, float(at)) for name, word, at in (line.rsplit(" ", 2) for line in lines)]


@pytest.mark.asyncio
async def test_a_crashed_child_is_restarted_and_the_others_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = make_supervisor(stub("executor", SLEEP), stub("gateway", SLEEP))
    async with running(supervisor):
        await until(lambda: len(supervisor.pids()) == 2)
        before = supervisor.pids()
        os.kill(before["executor"], signal.SIGKILL)
        await until(lambda: supervisor.pids().get("executor", before["executor"]) != before["executor"])
        assert supervisor.pids()["gateway"] == before["gateway"]
        lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("executor was ended by SIGKILL after 0.") and lines[0].endswith("restarting it in 0.1 s")


@pytest.mark.asyncio
async def test_the_wait_before_a_restart_doubles_up_to_a_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    crash = "import time; open(LOG, 'a').write(f'x started {time.monotonic()}\\n')"
    async with running(make_supervisor(stub("x", crash, log=log))):
        await until(lambda: len(events(log)) == 6)
    waits = [later[2] - earlier[2] for earlier, later in itertools.pairwise(events(log))]
    assert all(wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2, 0.2, 0.2), strict=True)), waits
    assert waits[-1] < 0.8, "the fifth wait would be 0.8 s without the limit"


@pytest.mark.asyncio
async def test_the_wait_starts_over_after_a_healthy_time(caplog: pytest.LogCaptureFixture) -> None:
    timings = Timings(first_backoff_s=0.05, max_backoff_s=5.0, ready_poll_s=0.01, healthy_after_s=0.2)
    supervisor = make_supervisor(stub("x", "import time; time.sleep(0.3)"), timings=timings)
    async with running(supervisor):
        await until(lambda: len(caplog.records) == 3)
    assert all(record.getMessage().endswith("restarting it in 0.1 s") for record in caplog.records)


@pytest.mark.asyncio
async def test_exit_code_2_during_start_ends_everything_with_2_and_no_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    refuse = "import sys; open(LOG, 'a').write(f'x started 0\\n'); sys.exit(2)"
    supervisor = make_supervisor(stub("executor", refuse, log=log), stub("gateway", SLEEP), is_ready=never)
    started_at = time.monotonic()
    assert await supervisor.run(asyncio.Event()) == 2
    assert time.monotonic() - started_at < 5.0
    assert supervisor.pids() == {} and caplog.records == [] and len(events(log)) == 1


@pytest.mark.asyncio
async def test_exit_code_2_after_the_start_is_a_crash_like_any_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    refuse = "import sys, time; open(LOG, 'a').write('x started 0\\n'); time.sleep(0.1); sys.exit(2)"
    async with running(make_supervisor(stub("executor", refuse, log=log))) as task:
        await until(lambda: len(events(log)) == 3)
        assert not task.done()


@pytest.mark.asyncio
async def test_a_child_that_cannot_start_three_times_ends_everything_with_1(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = make_supervisor(stub("executor", "raise SystemExit(1)"), stub("gateway", SLEEP), is_ready=never)
    assert await supervisor.run(asyncio.Event()) == 1
    assert caplog.records[-1].getMessage() == "executor exited with code 1; gave up after 3 starts"
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING, logging.ERROR]


@pytest.mark.asyncio
async def test_a_program_that_is_not_there_ends_everything_with_1(caplog: pytest.LogCaptureFixture) -> None:
    missing = ChildSpec("executor", ("/nowhere/python",), StopStage.BACKEND)
    assert await make_supervisor(missing, is_ready=never).run(asyncio.Event()) == 1
    assert "executor cannot be started: No such file or directory" in caplog.text


@pytest.mark.asyncio
async def test_stopping_goes_stage_by_stage(tmp_path: Path) -> None:
    log = tmp_path / "log"
    supervisor = make_supervisor(
        stub("executor", NOTE, StopStage.BACKEND, log),
        stub("tokenizer", NOTE, StopStage.BACKEND, log),
        stub("scheduler", NOTE, StopStage.SCHEDULER, log),
        stub("gateway", NOTE, StopStage.GATEWAY, log),
    )
    async with running(supervisor) as task:
        await until(lambda: len(events(log)) == 4)
    assert task.result() == 0
    stop_events = [(name, word) for name, word, _ in events(log)[4:]]
    assert stop_events[:4] == [
        ("gateway", "asked"),
        ("gateway", "ended"),
        ("scheduler", "asked"),
        ("scheduler", "ended"),
    ]
    backends = [("executor", "asked"), ("executor", "ended"), ("tokenizer", "asked"), ("tokenizer", "ended")]
    assert sorted(stop_events[4:]) == backends


@pytest.mark.asyncio
async def test_children_that_ignore_sigterm_are_killed_within_3_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = [tmp_path / name for name in ("gateway", "scheduler", "executor")]
    supervisor = Supervisor(
        [stub(log.name, IGNORE_SIGTERM, stage, log) for log, stage in zip(logs, StopStage, strict=True)],
        is_ready=always,
        on_ready=lambda: None,
    )
    async with running(supervisor) as task:
        await until(lambda: all(log.exists() for log in logs))
        pids = supervisor.pids().values()
        stop_at = time.monotonic()
    assert time.monotonic() - stop_at < 3.0
    assert task.result() == 0 and not any(psutil.pid_exists(pid) for pid in pids)
    assert caplog.records[-1].getMessage() == "killing what did not stop in time: gateway, scheduler, executor"


@pytest.mark.asyncio
async def test_stopping_does_not_wait_for_a_backoff() -> None:
    timings = Timings(first_backoff_s=60.0, ready_poll_s=0.01)
    supervisor = make_supervisor(stub("x", "raise SystemExit(1)"), timings=timings)
    stop = asyncio.Event()
    task = asyncio.create_task(supervisor.run(stop))
    await asyncio.sleep(0.3)
    stop.set()
    assert await asyncio.wait_for(task, timeout=1.0) == 0


@pytest.mark.asyncio
async def test_helpers_that_a_crashed_child_left_are_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    leave = "import os, subprocess, sys, time\n"
    leave += "helper = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    leave += "open(LOG, 'a').write(f'helper started {helper.pid}\\n')\ntime.sleep(60)"
    supervisor = make_supervisor(stub("executor", leave, log=log), timings=Timings(first_backoff_s=60.0))
    async with running(supervisor):
        await until(lambda: bool(events(log)))
        helper = psutil.Process(int(events(log)[0][2]))
        os.kill(supervisor.pids()["executor"], signal.SIGKILL)
        await until(lambda: not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE, timeout_s=2.0)


@pytest.mark.asyncio
async def test_children_do_not_share_the_session_of_the_terminal() -> None:
    supervisor = make_supervisor(stub("x", SLEEP))
    async with running(supervisor):
        assert os.getsid(supervisor.pids()["x"]) != os.getsid(0)


@pytest.mark.asyncio
async def test_a_variable_set_to_none_is_hidden_from_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIUM_API_KEY", "secret")
    log = tmp_path / "log"
    code = "import os; open(LOG, 'w').write(str(os.environ.get('TRIVIUM_API_KEY'))); " + SLEEP
    spec = stub("x", code, log=log)
    hidden = ChildSpec(spec.name, spec.argv, spec.stop_stage, env={"TRIVIUM_API_KEY": None})
    async with running(make_supervisor(hidden)):
        await until(lambda: log.exists() and log.read_text() != "")
    assert log.read_text() == "None"


DRIVER = """
import asyncio, json, os, signal, sys, tempfile
from trivium import supervisor as module
from trivium.process import configure_logging
from trivium.supervisor import ChildSpec, ServeConfig, StopStage
from trivium.config import ServedModel

SERVICE = '''
import asyncio, sys
from trivium.process import run_service
async def serve(stop):
    await asyncio.start_unix_server(lambda reader, writer: None, sys.argv[1])
    await stop.wait()
sys.exit(run_service(sys.argv[1], serve))
'''
runtime_dir = None
def build_children(config, directory):
    names = {"t": StopStage.BACKEND, "e0": StopStage.BACKEND, "s0": StopStage.SCHEDULER, "g": StopStage.GATEWAY}
    print(directory, flush=True)
    return [ChildSpec(name, (sys.executable, "-c", SERVICE, f"{directory}/{name}"), stage)
            for name, stage in names.items()]
async def is_ready(host, port):
    return True
module.build_children = build_children
module.gateway_is_ready = is_ready
configure_logging("supervisor")
config = ServeConfig(models=(ServedModel("m", "m"),), host="127.0.0.1", port=0)
sys.exit(module.serve(config))
"""


def start_server() -> tuple[subprocess.Popen[str], Path, list[psutil.Process]]:
    """`serve` in a process of its own, over four stub services that hold a socket each."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCE_ROOT}
    )
    assert process.stdout is not None
    directory = Path(process.stdout.readline().strip())
    wait_for(lambda: len(list(directory.iterdir())) == 4, 10.0)
    return process, directory, psutil.Process(process.pid).children(recursive=True)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_whole_server_and_leaves_nothing(number: signal.Signals) -> None:
    server, directory, children = start_server()
    assert (directory.stat().st_mode & 0o777, len(children)) == (0o700, 4)
    started_at = time.monotonic()
    server.send_signal(number)
    server.communicate(timeout=10)
    assert server.returncode == 0 and time.monotonic() - started_at < 3.0
    assert not directory.exists() and all(is_gone(child) for child in children)


def test_a_killed_supervisor_leaves_no_process_and_no_socket() -> None:
    server, directory, children = start_server()
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: all(is_gone(child) for child in children) and not directory.exists(), 2.0)
    server.communicate()


def test_a_supervisor_killed_together_with_a_child_leaves_no_socket_either() -> None:
    server, directory, children = start_server()
    os.kill(server.pid, signal.SIGKILL)
    os.kill(children[0].pid, signal.SIGKILL)
    wait_for(lambda: all(is_gone(child) for child in children) and not directory.exists(), 2.0)
    server.communicate()


def test_a_taken_port_is_one_line_and_exit_code_2_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "trivium", "serve", "name=hub/model", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": SOURCE_ROOT},
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"trivium: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1:8000: "):
        claim_port("192.0.2.1", 8000)


def test_port_0_takes_a_free_one() -> None:
    port = claim_port("127.0.0.1", 0)
    assert port > 0 and claim_port("127.0.0.1", port) == port


@pytest.mark.asyncio
@pytest.mark.parametrize(("status", "expected"), [("200 OK", True), ("503 Service Unavailable", False), ("", False)])
async def test_ready_means_that_the_readiness_route_answers_200(status: str, expected: bool) -> None:
    requests = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readline())
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode() if status else b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await gateway_is_ready("0.0.0.0", port) is expected
    assert requests == [b"GET /health/ready HTTP/1.1\r\n"]
    assert await gateway_is_ready("127.0.0.1", port) is False  # nobody listens any more


def make_config(*models: str, api_key: str | None = None) -> ServeConfig:
    return ServeConfig(
        models=tuple(ServedModel.parse(model) for model in models),
        host="127.0.0.1",
        port=8000,
        api_key=api_key,
        engine_flags=cli.command_flags(dtype="auto", max_num_seqs=8, revision=None),
    )


def parse(argv: tuple[str, ...]) -> dict[str, object]:
    """The parameters that the real parser reads from a child's command line, and `command`."""
    assert argv[:4] == (sys.executable, "-P", "-m", "trivium")
    group = typer.main.get_command(cli.app)
    name, rest = argv[4], list(argv[5:])
    return {"command": name, **group.commands[name].make_context(name, rest).params}  # type: ignore[attr-defined]


def test_every_child_has_a_command_line_that_the_real_parser_accepts() -> None:
    children = {child.name: child for child in build_children(make_config("a=/models/a", "org/B"), "/tmp/trivium-x")}
    assert set(children) == {"executor a", "executor org/B", "scheduler a", "scheduler org/B", "tokenizer", "gateway"}
    executor, scheduler = parse(children["executor a"].argv), parse(children["scheduler org/B"].argv)
    assert (executor["model"], executor["max_num_seqs"], executor["revision"]) == ("a=/models/a", 8, None)
    assert (scheduler["model"], scheduler["tokenizer"]) == ("org/B", "unix:/tmp/trivium-x/t")
    tokenizer, gateway = parse(children["tokenizer"].argv), parse(children["gateway"].argv)
    assert tokenizer["models"] == ["a=/models/a", "org/B=org/B"]
    assert cli.parse_routes(gateway["model"]) == {  # type: ignore[arg-type]
        "a": parse(children["scheduler a"].argv)["listen"],
        "org/B": scheduler["listen"],
    }
    assert scheduler["executor"] == parse(children["executor org/B"].argv)["listen"]
    assert gateway["tokenizer"] == tokenizer["listen"]


def test_executors_know_how_many_share_the_cores() -> None:
    for models in (("a",), ("a", "b")):
        children = build_children(make_config(*models), "/tmp/x")
        executors = [parse(child.argv) for child in children if child.name.startswith("executor")]
        assert [executor["num_local_executors"] for executor in executors] == [len(models)] * len(models)


def test_the_api_key_reaches_the_gateway_alone_and_no_process_list() -> None:
    children = build_children(make_config("a", api_key="secret"), "/tmp/x")
    assert not any("secret" in part for child in children for part in child.argv)
    assert {child.name: child.env["TRIVIUM_API_KEY"] for child in children if child.env["TRIVIUM_API_KEY"]} == {
        "gateway": "secret"
    }


def test_the_ready_block_holds_a_command_that_can_be_pasted() -> None:
    block = ready_block(make_config("it's=/m", "b", api_key="secret"), 2.345)
    title, url, models, command = block.splitlines()
    assert title == f"Trivium {trivium.__version__} is ready after 2.3 s"
    assert url.split() == ["URL", "http://127.0.0.1:8000/v1"] and models.split(maxsplit=1)[1] == "it's, b"
    words = shlex.split(command)
    assert words[1:3] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert "Authorization: Bearer $TRIVIUM_API_KEY" in words and "secret" not in block
    assert json.loads(words[-1])["model"] == "it's"
