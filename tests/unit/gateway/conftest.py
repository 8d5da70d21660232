"""One server for all tests of a module, with a model of each kind."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from unit.gateway.fakes import FakeEngine, RunningServer, World, make_info


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    tiny = FakeEngine(make_info("tiny"))
    translator = FakeEngine(make_info("org/translator", is_encoder_decoder=True))
    unloaded = FakeEngine(make_info("unloaded"), is_ready=False)
    server = RunningServer({"tiny": tiny, "org/translator": translator, "unloaded": unloaded})
    yield World(server, tiny, translator)
    server.stop()


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=world.server.base_url, api_key="none", max_retries=0, timeout=10) as client:
        yield client
