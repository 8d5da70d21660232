"""Beam search through the four processes: REST, gRPC stubs, streams, and processes killed in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import torch
from transformers import AutoTokenizer

from cluster import Cluster, serve
from oracle import PROMPTS
from tiny import load_oracle, save_tiny
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("served")

LONG = 400  # tokens: a second or two, so that a kill finds the search in the middle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beams") / "bart"
    return save_tiny("bart", path, with_tokenizer=True, max_position_embeddings=512)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("served_beams") / "serve.log"
    with serve(f"bart={checkpoint}", "--num-threads", "1", log=log) as cluster:
        yield cluster


def oracle_texts(checkpoint: Path, prompt: list[int], **kwargs: Any) -> list[str]:
    """What transformers returns, best first."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = load_oracle(checkpoint).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **kwargs
        )
    return [str(tokenizer.decode(sequence, skip_special_tokens=True)) for sequence in output]


def test_rest_by_its_names_and_by_those_of_transformers(cluster: Cluster, checkpoint: Path) -> None:
    prompt = PROMPTS[4]
    wanted = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}
    expected = oracle_texts(checkpoint, prompt, max_new_tokens=20, **wanted)
    forms: list[dict[str, Any]] = [
        wanted,
        {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 2.0},
        {"beam_width": 4, "n": 2, "length_penalty": 2.0},
    ]
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        for extra in forms:
            answer = client.completions.create(model="bart", prompt=prompt, max_tokens=20, extra_body=extra)
            assert [choice.text for choice in answer.choices] == expected
            assert [choice.index for choice in answer.choices] == [0, 1]


def test_chat_takes_beams(cluster: Cluster, checkpoint: Path) -> None:
    source = AutoTokenizer.from_pretrained(checkpoint)("Hello there")["input_ids"]
    expected = oracle_texts(checkpoint, source, num_beams=3, max_new_tokens=15)
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="bart",
            messages=[{"role": "user", "content": "Hello there"}],
            max_tokens=15,
            extra_body={"num_beams": 3},
        )
    assert [choice.message.content for choice in answer.choices] == expected


def test_direct_stubs_get_hypotheses_with_their_scores(cluster: Cluster, checkpoint: Path) -> None:
    argv = cluster.children()["scheduler"].cmdline()
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=PROMPTS[5]))),
        sampling=types_pb2.SamplingParams(
            n=3,
            temperature=0.0,
            max_tokens=12,
            beam=types_pb2.BeamSettings(width=3, early_stopping=types_pb2.EARLY_STOPPING_TRUE),
        ),
    )
    with grpc.insecure_channel(argv[argv.index("--listen") + 1]) as channel:
        responses = list(scheduler_pb2_grpc.SchedulerStub(channel).Generate(request, timeout=30))
    deltas = {response.delta.index: response.delta for response in responses if response.HasField("delta")}
    expected = oracle_texts(
        checkpoint, PROMPTS[5], num_beams=3, num_return_sequences=3, early_stopping=True, max_new_tokens=12
    )
    assert [deltas[index].text for index in range(3)] == expected
    sums = [deltas[index].cumulative_logprob / len(deltas[index].token_ids) for index in range(3)]
    assert sums == sorted(sums, reverse=True) and sums[0] < 0


def test_a_stop_string_cuts_what_a_beam_says(cluster: Cluster, checkpoint: Path) -> None:
    (text,) = oracle_texts(checkpoint, PROMPTS[6], num_beams=3, max_new_tokens=20, min_new_tokens=15)
    stop = text[4:6]
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="bart", prompt=PROMPTS[6], max_tokens=20, stop=stop, extra_body={"num_beams": 3, "min_tokens": 15}
        )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


class Search(threading.Thread):
    """One streamed beam search that takes a while. `first` is set with its first text, or its end."""

    def __init__(self, cluster: Cluster, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.url = cluster.url
        self.prompt = prompt
        self.first = threading.Event()
        self.texts = ["", ""]
        self.num_chunks = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with openai.OpenAI(base_url=self.url, api_key="none", max_retries=0) as client:
                chunks = client.completions.create(
                    model="bart",
                    prompt=self.prompt,
                    max_tokens=LONG,
                    stream=True,
                    n=2,
                    extra_body={"num_beams": 4, "ignore_eos": True},
                )
                for chunk in chunks:
                    for choice in chunk.choices:
                        self.texts[choice.index] += choice.text
                        self.num_chunks += 1
                    self.first.set()
        except Exception as error:
            self.error = error
        finally:
            self.first.set()


def run_searches(cluster: Cluster, service: str | None) -> list[Search]:
    searches = [Search(cluster, PROMPTS[index]) for index in (2, 7)]
    for search in searches:
        search.start()
    if service is not None:
        time.sleep(0.3)
        cluster.kill(service)
    for search in searches:
        search.join(90)
        assert search.error is None and not search.is_alive(), f"{search.error}\n{cluster.log.read_text()[-3000:]}"
    return searches


def test_text_is_streamed_as_soon_as_all_beams_agree(cluster: Cluster) -> None:
    searches = run_searches(cluster, None)
    assert all(search.num_chunks > 10 for search in searches), [search.num_chunks for search in searches]


@pytest.mark.parametrize("service", ["executor", "scheduler", "tokenizer"])
def test_a_killed_process_changes_no_result(cluster: Cluster, service: str) -> None:
    expected = [search.texts for search in run_searches(cluster, None)]
    assert [search.texts for search in run_searches(cluster, service)] == expected
    cluster.wait_ready()


def test_a_client_that_leaves_ends_its_beams(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        beams = {"num_beams": 4, "ignore_eos": True}
        chunks = client.completions.create(
            model="bart", prompt=PROMPTS[2], max_tokens=LONG, stream=True, extra_body=beams
        )
        next(iter(chunks))
        assert (cluster.held_blocks() or 0) > 0
        chunks.close()
    cluster.assert_nothing_held()
