import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from trivium.config import ExecutorConfig
from trivium.executor.threads import SMALL_MODEL_BYTES, choose_num_threads, one_thread, set_num_threads
from trivium_kernels.cpu import _native

T = TypeVar("T")


def config(**settings: int) -> ExecutorConfig:
    return ExecutorConfig(model="m", served_model_name="m", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "weight_bytes", "expected"),
    [
        ({}, SMALL_MODEL_BYTES - 1, 1),
        ({}, SMALL_MODEL_BYTES, 8),
        ({"num_local_executors": 3}, SMALL_MODEL_BYTES, 2),
        ({"num_local_executors": 20}, SMALL_MODEL_BYTES, 1),
        ({"num_local_executors": 2, "tensor_parallel_size": 2}, SMALL_MODEL_BYTES, 2),
        ({"num_threads": 5}, 1, 5),
        ({"num_threads": 5, "tensor_parallel_size": 2}, 1, 2),
        ({"num_threads": 1, "tensor_parallel_size": 2}, 1, 1),
    ],
)
def test_threads_follow_settings_size_and_share(settings: dict[str, int], weight_bytes: int, expected: int) -> None:
    assert choose_num_threads(config(**settings), weight_bytes, num_cores=8) == expected


@pytest.mark.parametrize(("policy", "torch_threads"), [("PASSIVE", 3), ("passive", 3), ("ACTIVE", 1), ("", 1)])
def test_threads_of_torch_that_would_spin_beside_ours_are_not_used(
    policy: str, torch_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)

    def threads() -> list[tuple[int, int]]:
        set_num_threads(3)
        before = _native.num_threads(), torch.get_num_threads()
        with one_thread():
            inside = _native.num_threads(), torch.get_num_threads()
        return [before, inside, (_native.num_threads(), torch.get_num_threads())]

    expected = (3, torch_threads)
    assert in_a_thread(threads) == [expected, (1, 1), expected]


@pytest.mark.parametrize(
    ("first", "policy"), [("pass", "PASSIVE"), ("import torch", "None"), ("os.environ['OMP_WAIT_POLICY'] = 'x'", "x")]
)
def test_the_policy_is_set_where_torch_has_not_read_it(first: str, policy: str) -> None:
    code = f"import os; os.environ.pop('OMP_WAIT_POLICY', None); {first}; from trivium import AsyncLLM; " + (
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == policy


def in_a_thread(work: Callable[[], T]) -> T:
    """The numbers of threads are of the thread that sets them, and of torch's first ones of the process."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]
