"""A model split over two processes, offline and served: what one process says, and no stream hurt by a lost rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters import save_adapter, targets_of
from cluster import Cluster, serve
from oracle import PROMPTS, oracle
from soft_prompts import save_soft_prompt
from streams import Stream, run_streams
from tiny import save_tiny
from trivium import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams, TokensPrompt
from trivium.adapters import LoRARequest, PromptAdapterRequest
from trivium.errors import EngineUnavailableError, InternalError

pytestmark = pytest.mark.xdist_group("recovery")

INPUTS = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS[:8]]
TOLERANCE = 1e-4
SAMPLED = (
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.0, seed=1, max_tokens=12, n=3),
    SamplingParams(temperature=0.8, seed=2, max_tokens=12, top_k=30, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, typical_p=0.8),
    SamplingParams(temperature=1.0, seed=4, max_tokens=12, xtc_probability=0.5, xtc_threshold=0.05),
    SamplingParams(temperature=1.2, seed=5, max_tokens=12, repetition_penalty=1.3, logit_bias={40: 5.0, 200: 5.0}),
    SamplingParams(temperature=0, max_tokens=12, no_repeat_ngram_size=2, bad_words=["a", "b"]),
    SamplingParams(temperature=0, max_tokens=20, prompt_lookup_num_tokens=4),
)


@dataclass(frozen=True)
class Pair:
    """The same checkpoint, split and whole."""

    path: Path
    split: LLM
    whole: LLM

    @property
    def rank(self) -> psutil.Process:
        (rank,) = (child for child in psutil.Process().children() if str(self.path) in _settings_of(child))
        return rank


def _settings_of(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@pytest.fixture(scope="module", params=["llama", "bart"])
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Pair]:
    path = checkpoints[request.param]
    settings: dict[str, Any] = {
        "num_threads": 1,
        "kv_cache_memory_bytes": 2**23,
        "served_model_name": str(path),
        "enable_lora": True,
        "enable_prompt_adapter": True,
    }
    split, whole = LLM(str(path), tensor_parallel_size=2, **settings), LLM(str(path), **settings)
    yield Pair(path, split, whole)
    split.close()
    whole.close()


def token_ids(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[tuple(choice.token_ids) for choice in output.outputs] for output in outputs]


def test_greedy_output_is_that_of_transformers(pair: Pair) -> None:
    outputs = pair.split.generate(INPUTS, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    expected = [oracle(pair.path, prompt, 10) for prompt in PROMPTS[: len(INPUTS)]]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_every_kind_of_sampling_says_the_same_in_one_batch(pair: Pair) -> None:
    found, expected = (
        token_ids(llm.generate(INPUTS, list(SAMPLED), use_tqdm=False)) for llm in (pair.split, pair.whole)
    )
    assert found == expected


def test_beams_are_the_same_with_the_same_scores(pair: Pair) -> None:
    for params in (
        BeamSearchParams(beam_width=4, max_tokens=10),
        BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.5, min_tokens=4),
        BeamSearchParams(beam_width=3, max_tokens=12, stop=tuple("aeiou")),
    ):
        found, expected = (llm.beam_search(INPUTS, params) for llm in (pair.split, pair.whole))
        for output, other in zip(found, expected, strict=True):
            sequences, others = output.sequences, other.sequences
            assert [beam.tokens for beam in sequences] == [beam.tokens for beam in others]
            assert [beam.cum_logprob for beam in sequences] == pytest.approx(
                [beam.cum_logprob for beam in others], abs=TOLERANCE
            )


def test_log_probabilities_are_the_same(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5)
    found, expected = (llm.generate(INPUTS, params, use_tqdm=False) for llm in (pair.split, pair.whole))
    for output, other in zip(found, expected, strict=True):
        for mine, theirs in zip(output.outputs[0].logprobs or (), other.outputs[0].logprobs or (), strict=True):
            assert list(mine) == list(theirs)
            values = [item.logprob for item in mine.values()]
            assert values == pytest.approx([item.logprob for item in theirs.values()], abs=TOLERANCE)
        assert output.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=TOLERANCE)


def test_vectors_are_the_same(pair: Pair) -> None:
    found, expected = (llm.embed(INPUTS, use_tqdm=False) for llm in (pair.split, pair.whole))
    for output, other in zip(found, expected, strict=True):
        assert output.outputs.embedding == pytest.approx(other.outputs.embedding, abs=TOLERANCE)


def test_adapters_that_are_loaded_later_reach_every_rank(pair: Pair, tmp_path: Path) -> None:
    family = "llama" if "llama" in pair.path.name else "bart"
    lora = LoRARequest("lora", 1, str(save_adapter(pair.path, tmp_path / "lora", targets_of(family))))
    kinds = ("prompt", "prefix") if family == "llama" else ("prompt",)  # PEFT cannot make a prefix of this BART
    soft = [
        PromptAdapterRequest(kind, number, str(save_soft_prompt(pair.path, tmp_path / kind, kind)), 5)
        for number, kind in enumerate(kinds, start=1)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=10)

    def say(llm: LLM) -> list[list[list[tuple[int, ...]]]]:
        plain = llm.generate(INPUTS, greedy, use_tqdm=False)
        changed = llm.generate(INPUTS, greedy, use_tqdm=False, lora_request=lora)
        softened = [llm.generate(INPUTS, greedy, use_tqdm=False, prompt_adapter_request=each) for each in soft]
        return [token_ids(outputs) for outputs in (plain, changed, *softened)]

    found = say(pair.split)
    assert found == say(pair.whole)
    assert all(outputs != found[0] for outputs in found[1:])


def test_every_rank_follows_a_grammar(pair: Pair) -> None:
    grammar = StructuredOutputsParams(regex="[a-f]{3,6}-[0-9]{2}")
    params = [
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=grammar),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, structured_outputs=grammar),
        SamplingParams(temperature=1.0, seed=4, max_tokens=20),
    ]
    found, expected = (llm.generate(INPUTS[:3], params, use_tqdm=False) for llm in (pair.split, pair.whole))
    assert [output.outputs[0].text for output in found] == [output.outputs[0].text for output in expected]
    assert "-" in found[0].outputs[0].text and found[0].outputs[0].finish_reason == "stop"


def test_a_rank_that_is_killed_while_nothing_runs_fails_the_next_call(pair: Pair) -> None:
    """The last test of a pair: offline nobody starts the model again."""
    rank = pair.rank
    rank.kill()
    rank.wait(10)
    began_at = time.monotonic()
    for _ in range(2):
        with pytest.raises((InternalError, EngineUnavailableError)):
            pair.split.generate(INPUTS, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert time.monotonic() - began_at < 10
    assert pair.whole.generate(INPUTS[:1], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)


def rank_of(cluster: Cluster) -> psutil.Process:
    (rank,) = cluster.children()["executor"].children()
    return rank


def test_a_killed_rank_is_a_pause_and_nothing_outlives_the_server(tmp_path: Path) -> None:
    path, log = (
        save_tiny("llama", tmp_path / "llama", with_tokenizer=True, max_position_embeddings=512),
        tmp_path / "log",
    )
    with LLM(str(path), num_threads=1) as llm:
        params = [
            SamplingParams(temperature=temperature, seed=7, max_tokens=150, ignore_eos=True)
            for temperature in (1.0, 0.0, 1.0, 0.0)
        ]
        prompts = ["x" * index for index in range(1, len(params) + 1)]
        expected = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    with serve(f"llama={path}", "--tensor-parallel-size", "2", "--num-threads", "1", log=log) as cluster:
        executor, rank = cluster.children()["executor"], rank_of(cluster)
        assert run_streams(cluster, rank.kill, max_tokens=150) == expected
        assert "rank 1 was ended by SIGKILL; nothing can go on without it" in log.read_text()
        assert not executor.is_running()
        cluster.wait_ready()
        left = [*cluster.children().values(), rank_of(cluster)]
        assert len(left) == 5 and rank not in left
        stream = Stream(cluster, "abc", temperature=0.0, max_tokens=400)
        stream.start()
        assert stream.first.wait(60)
        os.kill(cluster.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=5)
        assert not alive
        cluster.process.wait(5)
