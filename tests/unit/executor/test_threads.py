import pytest

from trivium.config import ExecutorConfig
from trivium.executor.threads import SMALL_MODEL_BYTES, choose_num_threads


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
