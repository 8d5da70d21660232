"""So many requests a minute from each caller, and no more."""

from __future__ import annotations

import pytest

from trivium_gateway.errors import RateLimitedError
from trivium_gateway.rate_limit import RateLimit
from unit.gateway.fakes import FakeEngine, RunningServer, make_info, post, request

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "a"}


class World:
    """A limit with a clock of its own."""

    def __init__(self, max_per_minute: int, *, by_key: bool = False) -> None:
        self.now_s = 1000.0
        self._limit = RateLimit(max_per_minute, by_key=by_key, clock=lambda: self.now_s)

    def wait_s(self, host: str = "10.0.0.1", key: str | None = None) -> int:
        """How long the caller is told to wait; 0 if its request is taken."""
        headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        try:
            self._limit.take({"client": (host, 1234), "headers": headers})
        except RateLimitedError as error:
            return error.retry_after_s
        return 0


def test_a_full_bucket_is_spent_at_once_and_refills_in_a_minute() -> None:
    world = World(3)
    assert [world.wait_s() for _ in range(5)] == [0, 0, 0, 20, 20]
    world.now_s += 19.5
    assert world.wait_s() == 1
    world.now_s += 0.5
    assert [world.wait_s(), world.wait_s()] == [0, 20]
    world.now_s += 60
    assert [world.wait_s() for _ in range(4)] == [0, 0, 0, 20]


def test_callers_have_buckets_of_their_own() -> None:
    world = World(1)
    assert [world.wait_s(host) for host in ("10.0.0.1", "10.0.0.2", "10.0.0.1")] == [0, 0, 60]


def test_an_ipv6_client_is_its_network() -> None:
    world = World(1)
    hosts = ("2001:db8::1", "2001:db8::ffff:0:0:2", "2001:db8:0:1::1", "fe80::1%eth0")
    assert [world.wait_s(host) for host in hosts] == [0, 60, 0, 0]


def test_an_ipv4_client_of_a_socket_for_both_is_its_address() -> None:
    world = World(1)
    hosts = ("::ffff:10.0.0.1", "::ffff:10.0.0.2", "10.0.0.1")
    assert [world.wait_s(host) for host in hosts] == [0, 0, 60]


def test_with_keys_the_key_counts_and_without_them_it_does_not() -> None:
    by_key, by_address = World(1, by_key=True), World(1)
    calls = (("10.0.0.1", "a"), ("10.0.0.2", "a"), ("10.0.0.1", "b"))
    assert [by_key.wait_s(*call) for call in calls] == [0, 60, 0]
    assert [by_address.wait_s(*call) for call in calls] == [0, 0, 60]


def test_the_oldest_callers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium_gateway.rate_limit.MAX_CALLERS", 2)
    world = World(1)
    hosts = ("10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3", "10.0.0.1", "10.0.0.2")
    assert [world.wait_s(host) for host in hosts] == [0, 0, 60, 0, 60, 0]


def test_over_http_only_posts_count() -> None:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))}, max_requests_per_minute=2)
    assert {request(server.port, "GET", "/v1/models").status for _ in range(5)} == {200}
    assert [post(server.port, path, BODY).status for path in (COMPLETIONS, "/tokenize")] == [200, 200]
    refused = post(server.port, COMPLETIONS, BODY)
    assert refused.error == (429, "rate_limit_exceeded", None)
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    server.stop()


def test_a_wrong_key_takes_nothing_from_the_right_one() -> None:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))}, max_requests_per_minute=1, api_key="k")
    answers = [post(server.port, COMPLETIONS, BODY, Authorization=f"Bearer {key}") for key in ("x", "x", "k", "k")]
    assert [answer.status for answer in answers] == [401, 401, 200, 429]
    server.stop()
