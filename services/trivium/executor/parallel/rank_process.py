"""A rank other than the first: a process without a will of its own, started by `Ranks`.

It repeats the calls of the first rank until its standard input ends, and prints nothing but, as JSON, why a model
cannot be loaded as configured. Signals that a terminal or a supervisor sends to the whole group mean the first rank,
which ends this one.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import shutil
import signal
import sys
import threading
from typing import NoReturn, TypeAlias

from trivium.errors import ConfigurationError
from trivium.executor.parallel.frames import Call, read_call
from trivium.process import EXIT_CONFIGURATION, EXIT_FAILURE, EXIT_OK, configure_logging, end_process

logger = logging.getLogger(__name__)

Calls: TypeAlias = "queue.SimpleQueue[tuple[Call, bytes]]"


def main() -> NoReturn:
    rank, size, rendezvous, device, name, level = sys.argv[1:]
    configure_logging(f"{name} rank {rank}", "debug" if level == "DEBUG" else "error")  # the first rank tells the rest
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report
    calls: Calls = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(calls, rendezvous), name="calls", daemon=True).start()
    try:
        _run(int(rank), int(size), rendezvous, device, calls)
    except ConfigurationError as error:
        json.dump(error.message, reports)
        reports.flush()
        end_process(EXIT_CONFIGURATION)
    except BaseException:
        logger.exception("the rank failed")
        end_process(EXIT_FAILURE)


def _read_calls(calls: Calls, rendezvous: str) -> None:
    """Queue them, and end the process with their stream, whatever it is doing: the first rank is gone."""
    while (item := read_call(sys.stdin.buffer)) is not None:
        calls.put(item)
    shutil.rmtree(os.path.dirname(rendezvous), ignore_errors=True)
    os._exit(EXIT_OK)


def _run(rank: int, size: int, rendezvous: str, device: str, calls: Calls) -> NoReturn:
    import torch

    from trivium.executor.model_runner import ModelRunner
    from trivium.executor.parallel.calls import config_from_bytes, repeat_call
    from trivium.executor.parallel.communicator import LOAD_TIMEOUT_S, STEP_TIMEOUT_S, RankGroup
    from trivium.executor.plan_check import PlanError

    gc.collect()
    gc.freeze()
    communicator = RankGroup(rank, size, rendezvous, torch.device(device))
    runner: ModelRunner | None = None
    while True:
        call, arguments = calls.get()
        if call is Call.LOAD:
            communicator.set_timeout(LOAD_TIMEOUT_S)
            runner = ModelRunner(config_from_bytes(arguments), communicator)
            communicator.set_timeout(STEP_TIMEOUT_S)
            continue
        assert runner is not None, "the first call loads a model"
        try:
            repeat_call(runner, call, arguments)
        except (PlanError, ConfigurationError) as error:
            logger.debug("%s refused: %s", call.name, error)  # by the first rank, too, which tells who asked


if __name__ == "__main__":
    main()
