"""Paths, methods, keys, request ids, models and health."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from unit.gateway.fakes import FakeEngine, RunningServer, World, make_info, post, request

KEY = "s3cret-Key"
OK_BODY = {"model": "tiny", "prompt": "a"}


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "org/translator", "unloaded"]
    assert all(model.object == "model" and model.owned_by == "trivium" and model.created > 0 for model in models)


@pytest.mark.parametrize("name", ["tiny", "org/translator", "unloaded"])
def test_one_model_is_shown(client: openai.OpenAI, name: str) -> None:
    assert client.models.retrieve(name).id == name


def test_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        client.models.retrieve("other")
    assert failure.value.code == "model_not_found" and failure.value.param == "model"


def test_live_answers_and_ready_names_what_is_missing(world: World) -> None:
    assert request(world.port, "GET", "/health/live").status == 200
    ready = request(world.port, "GET", "/health/ready")
    assert (ready.status, ready.json) == (503, {"status": "waiting", "waiting_for": ["unloaded"]})


def test_ready_follows_the_engine() -> None:
    engine = FakeEngine(make_info("tiny"), is_ready=False)
    server = RunningServer({"tiny": engine})
    assert [request(server.port, "GET", path).status for path in ("/health/ready", "/health")] == [503, 503]
    engine.ready = True
    assert [request(server.port, "GET", path).status for path in ("/health/ready", "/health")] == [200, 200]
    server.stop()


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))}, api_key=KEY)
    yield server
    server.stop()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": f"Bearer {KEY} "[:-2]},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \u00fc"},
        {"X-Api-Key": KEY},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", f"/v1/models?api_key={KEY}"),
        ("GET", "/metrics"),
        ("GET", "/health/live/"),
        ("GET", "/health/../v1/models"),
    ],
)
def test_everything_needs_the_key(locked: RunningServer, method: str, path: str, headers: dict[str, str]) -> None:
    answer = request(locked.port, method, path, headers=headers)
    assert answer.error == (401, "invalid_api_key", None)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_needs_no_key(locked: RunningServer) -> None:
    assert request(locked.port, "GET", "/health/live").status == 200
    assert request(locked.port, "GET", "/health/ready").status == 200
    assert request(locked.port, "GET", "/health").status == 200


def test_the_key_opens(locked: RunningServer) -> None:
    with openai.OpenAI(base_url=locked.base_url, api_key=KEY, max_retries=0) as client:
        assert client.completions.create(model="tiny", prompt="a").choices[0].text == "Hello world"


def test_request_id_is_returned_and_never_used_inside(world: World) -> None:
    answers = [post(world.port, "/v1/completions", OK_BODY, X_Request_Id="mine 1") for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine 1"] * 2
    assert answers[0].json["id"] != answers[1].json["id"]
    assert all(answer.json["id"].startswith("cmpl-") for answer in answers)


def test_request_id_is_made_up_where_none_is_given(world: World) -> None:
    ids = {post(world.port, "/v1/completions", OK_BODY).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


def test_the_openai_client_sees_the_request_id(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="a", extra_headers={"X-Request-Id": "mine"})
    assert completion._request_id == "mine"
