"""`run_service` in real processes: exit codes, signals, and no life without the supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trivium
from trivium.errors import ConfigurationError
from trivium.process import (
    PARENT_FD,
    RUNTIME_DIR,
    find_configuration_error,
    remove_sockets,
    wait_passively,
    watch_parent,
)

SOURCE_ROOT = str(Path(trivium.__file__).parents[1])
PROLOGUE = (
    "import asyncio, os, sys, time\nfrom trivium.errors import ConfigurationError\nfrom trivium.process import *\n"
)


@contextmanager
def service(
    body: str, *, preload: str = "()", env: dict[str, str] | None = None, fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `async def serve(stop)` with `body`; it prints what the test waits for to stdout."""
    lines = "\n".join("    " + line for line in body.splitlines())
    script = f"{PROLOGUE}async def serve(stop):\n{lines}\nsys.exit(run_service('unit', serve, preload={preload}))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": SOURCE_ROOT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


WAIT_FOR_STOP = "print('up', flush=True)\nawait stop.wait()\nprint('stopped', flush=True)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_stop_and_the_process_ends_with_0(number: signal.Signals) -> None:
    with service(WAIT_FOR_STOP) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")


def test_a_second_interrupt_ends_a_service_that_does_not_stop() -> None:
    body = "print('up', flush=True)\nawait stop.wait()\nprint('stopping', flush=True)\nawait asyncio.sleep(60)"
    with service(body) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def test_a_signal_during_the_imports_ends_the_process_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = {"PYTHONPATH": f"{SOURCE_ROOT}:{tmp_path}"}
    with service(WAIT_FOR_STOP, preload="('slow_module',)", env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=2) == 128 + signal.SIGTERM


def test_leaving_waits_for_no_thread_and_loses_no_output() -> None:
    script = f"{PROLOGUE}import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    script += "print('said')\nprint('warned', file=sys.stderr, end='')\nend_process(3)"
    environment = {**os.environ, "PYTHONPATH": SOURCE_ROOT}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
    assert (result.returncode, result.stdout, result.stderr) == (3, "said\n", "warned")


def test_a_normal_return_ends_with_0() -> None:
    with service("print('done')") as process:
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, "done\n", "")


def test_a_configuration_error_is_one_line_and_exit_code_2() -> None:
    with service("raise ConfigurationError('max_model_len must be\\nat least 1, got 0')") as process:
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (2, "trivium: error: max_model_len must be at least 1, got 0\n")


def test_a_configuration_error_inside_a_task_group_is_still_one_line() -> None:
    body = "async def fail():\n    raise ConfigurationError('no such model')\n"
    body += "async with asyncio.TaskGroup() as tasks:\n    tasks.create_task(fail())"
    with service(body) as process:
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (2, "trivium: error: no such model\n")


def test_any_other_exception_is_logged_with_its_traceback_and_ends_with_1() -> None:
    with service("raise RuntimeError('device lost')") as process:
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    first, *rest = errors.splitlines()
    assert first.endswith("ERROR [unit] unit failed")
    assert rest[0] == "Traceback (most recent call last):" and rest[-1] == "RuntimeError: device lost"


def test_a_task_group_without_a_configuration_error_holds_none() -> None:
    assert find_configuration_error(ExceptionGroup("", [ValueError("x")])) is None


def test_the_log_level_is_for_our_own_packages_and_libraries_stay_at_warning() -> None:
    body = "import logging\nfor name in ('trivium.x', 'other'):\n    logging.getLogger(name).info('from %s', name)"
    with service(body) as process:
        _, errors = process.communicate(timeout=10)
    assert [line.split(" INFO ")[1] for line in errors.splitlines()] == ["[unit] from trivium.x"]


@pytest.mark.parametrize("body", [WAIT_FOR_STOP, "print('up', flush=True)\nwhile True: pass"], ids=["idle", "busy"])
def test_an_orphan_removes_the_sockets_and_ends(tmp_path: Path, body: str) -> None:
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(runtime_dir / "s"))
    read_fd, write_fd = os.pipe()
    env = {PARENT_FD: str(read_fd), RUNTIME_DIR: str(runtime_dir)}
    with service(body, env=env, fds=(read_fd,)) as process:
        os.close(read_fd)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert process.poll() is None
        os.close(write_fd)
        assert process.wait(timeout=2) == 1
    assert not runtime_dir.exists()


def test_a_supervisor_that_dies_during_the_imports_leaves_no_orphan(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    read_fd, write_fd = os.pipe()
    env = {"PYTHONPATH": f"{SOURCE_ROOT}:{tmp_path}", PARENT_FD: str(read_fd)}
    with service(WAIT_FOR_STOP, preload="('slow_module',)", env=env, fds=(read_fd,)) as process:
        os.close(read_fd)
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        os.close(write_fd)
        assert process.wait(timeout=2) == 1


def test_helpers_of_a_service_inherit_neither_the_pipe_nor_its_variables() -> None:
    read_fd, write_fd = os.pipe()
    helper = f"import os, sys; os.fstat({read_fd})"
    body = (
        "import subprocess\n"
        f"code = subprocess.call([sys.executable, '-c', {helper!r}], close_fds=False, stderr=subprocess.DEVNULL)\n"
        f"print(code, {PARENT_FD!r} in os.environ, {RUNTIME_DIR!r} in os.environ)"
    )
    with service(body, env={PARENT_FD: str(read_fd), RUNTIME_DIR: "/nowhere"}, fds=(read_fd,)) as process:
        output, _ = process.communicate(timeout=10)
    os.close(read_fd)
    os.close(write_fd)
    assert output == "1 False False\n"


@pytest.mark.parametrize("text", ["x", "9999"])
def test_a_parent_descriptor_that_is_not_open_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{PARENT_FD} must be an open file descriptor, got '{text}'"):
        watch_parent({PARENT_FD: text})


def test_remove_sockets_spares_everything_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    remove_sockets(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "notes.txt"]


def test_remove_sockets_of_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    remove_sockets(str(tmp_path / "gone"))


def test_openmp_threads_wait_passively_unless_the_user_has_said_otherwise() -> None:
    environ = {"GOMP_SPINCOUNT": "7"}
    wait_passively(environ)
    assert environ == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}
