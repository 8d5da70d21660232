"""What every endpoint does alike with fields that it does not know, and with repeated requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from trivium_gateway.openai_protocol import UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION
from unit.gateway.fakes import FakeEngine, RunningServer, World, make_info, post, request

COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "hi"}
# path -> a request that it takes
ENDPOINTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": "a"},
    "/v1/chat/completions": {"model": "tiny", "messages": [USER]},
    "/v1/translations": {"model": "org/translator", "input": "a"},
    "/v1/embeddings": {"model": "tiny", "input": "a"},
    "/tokenize": {"model": "tiny", "prompt": "a"},
    "/detokenize": {"model": "tiny", "tokens": [97]},
}


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    engines = {
        "tiny": FakeEngine(make_info("tiny")),
        "org/translator": FakeEngine(make_info("org/translator", is_encoder_decoder=True)),
    }
    server = RunningServer(engines, strict=True)
    yield server
    server.stop()


def num_ignored(port: int) -> float:
    lines = request(port, "GET", "/metrics").body.decode().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("trivium_gateway_unknown_fields_total "))
    return float(value)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_unknown_fields_are_ignored_and_counted(world: World, path: str) -> None:
    before = num_ignored(world.port)
    assert post(world.port, path, ENDPOINTS[path] | {"odd": 1, "odder": None}).status == 200
    assert num_ignored(world.port) == before + 2


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_strict_server_names_them(strict: RunningServer, path: str) -> None:
    assert post(strict.port, path, ENDPOINTS[path]).status == 200
    assert post(strict.port, path, ENDPOINTS[path] | {"odd": None}).error == (400, "unknown_field", "odd")
    answer = post(strict.port, path, ENDPOINTS[path] | {"x" * 1000: 1})
    assert answer.error == (400, "unknown_field", "x" * 40)


@pytest.mark.parametrize(
    ("path", "unsupported"),
    [(COMPLETIONS, UNSUPPORTED_COMPLETION), ("/v1/chat/completions", UNSUPPORTED_CHAT)],
)
def test_what_is_refused_by_name_is_not_unknown(
    strict: RunningServer, path: str, unsupported: dict[str, tuple[object, ...]]
) -> None:
    unused = {name: values[-1] for name, values in unsupported.items()} | {"chat_template": None}
    assert post(strict.port, path, ENDPOINTS[path] | unused).status == 200
    answer = post(strict.port, path, ENDPOINTS[path] | {"mirostat_mode": 2})
    assert answer.error == (400, "unsupported_parameter", "mirostat_mode")


def with_key(port: int, key: str, path: str = COMPLETIONS, **fields: Any) -> tuple[int, str | None, str | None]:
    answer = post(port, path, ENDPOINTS[path] | fields, Idempotency_Key=key)
    return answer.error if answer.status != 200 else (200, None, None)


def test_a_repeated_request_runs_again_and_another_one_under_its_key_is_refused(world: World) -> None:
    ok, mismatch = (200, None, None), (400, "idempotency_mismatch", "Idempotency-Key")
    num_runs = len(world.tiny.requests)
    assert [with_key(world.port, "one") for _ in range(2)] == [ok, ok]
    assert len(world.tiny.requests) == num_runs + 2
    assert with_key(world.port, "one", prompt="b") == mismatch
    assert with_key(world.port, "one", path="/tokenize") == mismatch
    assert with_key(world.port, "two", prompt="b") == ok
    assert with_key(world.port, "one") == ok


def test_keys_of_different_callers_are_different_keys(world: World) -> None:
    for caller in ("a", "b"):
        headers = {"Idempotency_Key": "shared", "Authorization": f"Bearer {caller}"}
        assert post(world.port, COMPLETIONS, ENDPOINTS[COMPLETIONS] | {"prompt": caller}, **headers).status == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\u00fc"])
def test_a_key_that_is_none_is_refused(world: World, key: str) -> None:
    assert with_key(world.port, key) == (400, "invalid_value", "Idempotency-Key")


def test_the_oldest_keys_are_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium_gateway.idempotency.MAX_KEYS", 2)
    assert [with_key(world.port, f"key {number}")[0] for number in range(3)] == [200] * 3
    assert with_key(world.port, "key 2", prompt="b")[0] == 400
    assert with_key(world.port, "key 0", prompt="b")[0] == 200
