"""Adapters as models: listed with their parent, routed to its engine by name, counted for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from trivium.config import PromptAdapter
from trivium_gateway.routing import ModelRoutes
from unit.gateway.fakes import FakeEngine, RunningServer, make_info, post, request


@dataclass(frozen=True, slots=True)
class Server:
    running: RunningServer
    base: FakeEngine
    other: FakeEngine


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    base = FakeEngine(replace(make_info("base"), adapters=("sql", "org/law", "other"), max_loras=2))
    other = FakeEngine(make_info("other"))
    running = RunningServer({"base": base, "other": other, "unloaded": FakeEngine(make_info("x"), is_ready=False)})
    yield Server(running, base, other)
    running.stop()


def test_models_lists_every_adapter_after_the_models(server: Server) -> None:
    models = request(server.running.port, "GET", "/v1/models").json["data"]
    assert [(model["id"], model.get("parent")) for model in models] == [
        ("base", None),
        ("other", None),
        ("unloaded", None),
        ("sql", "base"),
        ("org/law", "base"),
    ]
    assert request(server.running.port, "GET", "/v1/models/org/law").json == models[-1]


@pytest.mark.parametrize("name", ["sql", "org/law"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_for_an_adapter_goes_to_its_base_and_names_it(server: Server, name: str, stream: bool) -> None:
    answer = post(server.running.port, "/v1/completions", {"model": name, "prompt": "hi", "stream": stream})
    assert answer.status == 200 and f'"model":"{name}"'.encode() in answer.body
    assert server.base.requests[-1].adapter == name
    assert not server.other.requests


def test_a_model_of_the_same_name_goes_first(server: Server) -> None:
    assert post(server.running.port, "/v1/completions", {"model": "other", "prompt": "hi"}).status == 200
    assert server.other.requests.pop().adapter == ""


def test_a_call_for_the_base_has_no_adapter(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert post(server.running.port, "/v1/chat/completions", {"model": "base", "messages": messages}).status == 200
    assert server.base.requests[-1].adapter == ""


def test_calls_for_adapters_are_counted_for_their_base(server: Server) -> None:
    def count() -> int:
        text = request(server.running.port, "GET", "/metrics").body.decode()
        lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
        assert not any("sql" in line for line in text.splitlines())
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if '"base"' in line))

    before = count()
    post(server.running.port, "/v1/completions", {"model": "sql", "prompt": "hi"})
    assert count() == before + 3


def test_routes_know_adapters_only_of_models_that_have_been_reached() -> None:
    engine = FakeEngine(replace(make_info("base"), adapters=("sql",)), is_ready=False)
    routes = ModelRoutes({"base": engine})
    assert (routes.adapters(), routes.adapter_of("sql"), routes.base_of("sql")) == ({}, "", "sql")
    engine.ready = True
    assert (routes.adapters(), routes.adapter_of("sql"), routes.base_of("sql")) == ({"sql": "base"}, "sql", "base")


SOFT = PromptAdapter("pirate", 100)


@pytest.fixture
def soft() -> Iterator[Server]:
    base = FakeEngine(replace(make_info("base"), prompt_adapters=(SOFT,), max_prompt_adapters=2, max_model_len=128))
    running = RunningServer({"base": base})
    yield Server(running, base, base)
    running.stop()


def test_a_soft_prompt_is_a_model_of_its_name_with_less_context(soft: Server) -> None:
    models = request(soft.running.port, "GET", "/v1/models").json["data"]
    facts = [(model["id"], model.get("parent"), model["max_model_len"]) for model in models]
    assert facts == [("base", None, 128), ("pirate", "base", 28)]


def test_a_call_for_a_soft_prompt_goes_to_its_base_and_names_it(soft: Server) -> None:
    answer = post(soft.running.port, "/v1/completions", {"model": "pirate", "prompt": [5, 6, 7]})
    assert answer.status == 200 and answer.json["usage"]["prompt_tokens"] == 3
    assert (soft.base.requests[-1].adapter, soft.base.requests[-1].prompt_adapter) == ("", "pirate")
    assert soft.base.requests[-1].prompt.token_ids == (5, 6, 7)


def test_virtual_tokens_leave_less_room_for_a_prompt(soft: Server) -> None:
    body = {"model": "pirate", "prompt": [5] * 20, "max_tokens": 9}
    answer = post(soft.running.port, "/v1/completions", body)
    assert answer.status == 400 and answer.json["error"]["code"] == "context_length_exceeded"
    assert post(soft.running.port, "/v1/completions", {**body, "max_tokens": 8}).status == 200
    assert post(soft.running.port, "/v1/completions", {**body, "model": "base", "max_tokens": 9}).status == 200
