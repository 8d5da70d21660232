"""Structured outputs with real processes and the openai client: parsed, checked, killed, and attacked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from cluster import Cluster, serve
from time_limits import GRAMMAR_S
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("structured")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
RESPONSE_FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
X_PATTERNS = [f".*{'x' * count}.*" for count in range(1, 40)]
# name -> (field, value, code, words of the refusal), each of which must hold up nobody else. The first three never end.
PATHOLOGICAL: dict[str, tuple[str, Any, str, str]] = {
    "patterns at once": (
        "guided_json",
        {"allOf": [{"type": "string", "pattern": pattern} for pattern in X_PATTERNS]},
        "grammar_too_complex",
        "too complex",
    ),
    "terminals at once": (
        "guided_grammar",
        "start: T\nT: " + " & ".join(f"/{pattern}/" for pattern in X_PATTERNS),
        "grammar_too_complex",
        "too complex",
    ),
    "a large divisor": (
        "guided_json",
        {"type": "integer", "multipleOf": 999_983},
        "grammar_too_complex",
        "too complex",
    ),
    "terminals that double": (
        "guided_grammar",
        "start: R0\n" + "\n".join(f"R{index}: R{index + 1} R{index + 1}" for index in range(60)) + '\nR60: "a"?',
        "invalid_grammar",
        "too big",
    ),
    "a product of alternatives": (
        "guided_json",
        {"allOf": [{"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(8)]} for i in range(12)]},
        "invalid_grammar",
        "too large",
    ),
    "many properties": ("guided_json", {"properties": {str(i): {} for i in range(20_000)}}, "too_long", "characters"),
    "many strings": (
        "guided_choice",
        [f"{index}" for index in range(2000)],
        "invalid_grammar",
        "1 to 1024",
    ),
    "deep parentheses": ("guided_regex", "(" * 5000 + "a" + ")" * 5000, "invalid_grammar", "invalid regex"),
    "deep rules": ("guided_grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "invalid_grammar", "recursion"),
    "a reference to itself": ("guided_json", {"$ref": "#"}, "invalid_grammar", "no token"),
}
LONG = "([a-z]{5} ){180}end"


def is_person(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and isinstance(value["name"], str) and 0 <= value["age"] <= 99


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("structured")
    llama = save_tiny("llama", folder / "llama", with_tokenizer=True, max_position_embeddings=2048)
    bart = save_tiny("bart", folder / "bart", with_tokenizer=True)
    with serve("trivium-chat", f"llama={llama}", f"bart={bart}", log=folder / "serve.log") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, model: str = "llama", **fields: Any) -> str:
    settings: dict[str, Any] = {"prompt": "hello", "max_tokens": 120, "temperature": 1.2, "seed": 5}
    extra = {
        name: fields.pop(name) for name in list(fields) if name not in ("n", "temperature", "stream", "max_tokens")
    }
    return client.completions.create(model=model, **(settings | fields), extra_body=extra).choices[0].text


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_chat_with_a_json_schema(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="trivium-chat",
        messages=[{"role": "user", "content": "Who are you?"}],
        response_format=RESPONSE_FORMAT,
        temperature=temperature,
        seed=3,
        n=2,
        max_tokens=200,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert is_person(choice.message.content or "")


def test_a_stream_is_one_json_object(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="trivium-chat",
            messages=[{"role": "user", "content": "Who are you?"}],
            response_format=RESPONSE_FORMAT,
            max_tokens=200,
            stream=True,
        )
    )
    assert is_person("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_a_cut_object_finishes_by_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="trivium-chat",
        messages=[{"role": "user", "content": "hi"}],
        response_format={"type": "json_object"},
        max_tokens=2,
    )
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("model", ["llama", "bart"])
def test_every_kind_over_rest(client: openai.OpenAI, model: str) -> None:
    compact = {"json": SCHEMA, "disable_any_whitespace": True}
    assert is_person(complete(client, model, structured_outputs=compact))
    beams = {"use_beam_search": True, "best_of": 3, "temperature": 0.0}
    assert is_person(complete(client, model, guided_json=SCHEMA, guided_whitespace_pattern=" ?", **beams))
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", complete(client, model, guided_regex="[0-9]{4}-[0-9]{2}"))
    assert complete(client, model, structured_outputs={"choice": ["red", "green"]}) in ("red", "green")
    assert re.fullmatch("(ab)+!", complete(client, model, guided_grammar='root ::= "ab" root | "ab!"'))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_json": {"type": "frog"}}, "guided_json"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#/a"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_a_400_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="llama", prompt="a", stream=stream, extra_body=fields)
    assert caught.value.param == param
    assert caught.value.code == "invalid_grammar"


def stream_text(client: openai.OpenAI, seed: int, on_chunk: Callable[[], None]) -> str:
    text = ""
    for chunk in client.completions.create(
        model="llama",
        prompt="x" * (1 + seed),
        max_tokens=1500,
        temperature=float(seed % 2),
        seed=seed,
        stream=True,
        extra_body={"guided_regex": LONG},
    ):
        text += chunk.choices[0].text
        on_chunk()
    return text


@pytest.mark.parametrize("service", ["executor", "scheduler", "tokenizer"])
def test_a_killed_process_changes_no_output(client: openai.OpenAI, cluster: Cluster, service: str) -> None:
    def run(*, kill: bool) -> list[str]:
        events = [threading.Event() for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(stream_text, client, seed, event.set) for seed, event in enumerate(events)]
            for event in events:
                assert event.wait(30)
            if kill:
                for name, process in cluster.children().items():
                    if name.split()[0] == service and (
                        service == "tokenizer" or "llama" in " ".join(process.cmdline())
                    ):
                        process.kill()
            return [future.result(90) for future in running]

    expected = run(kill=False)
    assert all(re.fullmatch(LONG, text) for text in expected)
    assert run(kill=True) == expected
    cluster.wait_ready()


class Neighbour(threading.Thread):
    """Streams the same output again and again, and counts its pieces, until it is told to stop."""

    def __init__(self, client: openai.OpenAI) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._is_over = threading.Event()
        self.texts: set[str] = set()
        self.num_chunks = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                self.texts.add(stream_text(self._client, seed=7, on_chunk=self._count))
        except Exception as error:
            self.error = error

    def _count(self) -> None:
        self.num_chunks += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join(60)
        assert self.error is None and not self.is_alive(), self.error


@pytest.fixture(scope="module")
def neighbour(client: openai.OpenAI) -> Iterator[Neighbour]:
    complete(client, guided_regex="warm")
    neighbour = Neighbour(client)
    neighbour.start()
    yield neighbour
    neighbour.stop()
    (text,) = neighbour.texts
    assert re.fullmatch(LONG, text)


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_a_pathological_grammar_is_refused_while_others_go_on(
    client: openai.OpenAI, cluster: Cluster, neighbour: Neighbour, name: str
) -> None:
    field, value, code, words = PATHOLOGICAL[name]
    num_chunks, began_s = neighbour.num_chunks, time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        attack = pool.submit(complete, client, **{field: value})
        num_beside = 0
        while not attack.done():
            assert complete(client, guided_regex="warm") == "warm"  # known, so it need not wait for its turn
            num_beside += 1
        took_s = time.monotonic() - began_s
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            attack.result()
    assert (caught.value.param, caught.value.code) == (field, code)
    assert took_s < GRAMMAR_S
    assert "Traceback" not in cluster.log.read_text()
    if words == "too complex":
        assert num_beside > 5 and neighbour.num_chunks > num_chunks + 5
