"""The harness of the benchmarks on tiny checkpoints: peers in processes of their own, and what their times become."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NAMES = ("trivium float32", "transformers generate", "CTranslate2 float32")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The modules of benchmarks/, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = ("arrivals", "checkpoints", "goals", "harness", "peers", "roster")
        yield type("Modules", (), {name: __import__(name) for name in names})
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
                del sys.modules[name]


@pytest.fixture(scope="module")
def folder(modules: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.checkpoints, "FOLDER", tmp_path_factory.mktemp("checkpoints"))
        patch.delenv("TRIVIUM_BENCH_VLLM", raising=False)
        yield


@pytest.fixture(scope="module")
def decoders(modules: Any, folder: None) -> Iterator[Any]:
    """A roster of a tiny Llama, with vLLM missing."""
    shape = modules.checkpoints.LLAMA_FP32
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny = replace(shape, name="tiny-llama", config={**shape.config, **sizes, **heads})
    with modules.roster.Roster(modules.roster.Maker(1), tiny, (*NAMES, "vLLM")) as roster:
        yield roster


def test_every_engine_gives_the_same_tokens_of_one_checkpoint(modules: Any, decoders: Any) -> None:
    prompts = modules.harness.random_prompts(3, 7, 96)
    outputs = {peer.name: peer.generate(prompts, 5).value for peer in decoders.alive}
    assert set(outputs) == set(NAMES)
    assert all(tokens == outputs[NAMES[0]] for tokens in outputs.values()), outputs


def test_a_peer_that_is_not_installed_is_a_line_of_the_tables(modules: Any, decoders: Any) -> None:
    assert "TRIVIUM_BENCH_VLLM" in decoders.missing["vLLM"]
    report = modules.harness.Report("a run", 1)
    report.describe(decoders.all_started, decoders.missing)
    table = modules.harness.compare({}, NAMES[0], missing=decoders.missing)
    assert "| vLLM | - (not here" in table


def test_a_step_is_measured_in_turns_with_cpu_time(modules: Any, decoders: Any) -> None:
    harness = modules.harness
    asked = []

    def make_prompts(seed: int) -> list[list[int]]:
        asked.append(seed)
        return list(harness.random_prompts(2, 4, 96, seed))

    timings = harness.decode_steps(decoders.only(*NAMES[:2]), make_prompts, harness.Steps(12), harness.Effort(2))
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {NAMES[0]: 2, NAMES[1]: 2}
    assert all(timing.cpu_median is not None for timing in timings.values())
    assert sorted(set(asked)) == [-1, 0, 1, 2, 3]


def test_requests_arrive_at_every_engine_and_end_at_their_own_length(modules: Any, decoders: Any) -> None:
    arrivals = modules.arrivals
    trace = arrivals.requests(decoders.shape, 5, 50.0)
    served = arrivals.serve(decoders.alive, lambda _: trace, modules.harness.Effort(1), max_batch=2)
    assert set(served.makespans) == set(NAMES)
    assert all(latency > 0 for runs in served.latencies.values() for run in runs for latency in run)
    assert served.table().count("\n") == 2 + len(NAMES)


def test_the_translator_ends_each_output_where_its_source_ends(modules: Any, folder: None) -> None:
    shape = modules.checkpoints.MARIAN
    sizes = {"vocab_size": 96, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    tiny = replace(shape, name="tiny-marian", config={**shape.config, **sizes, "decoder_ffn_dim": 16})
    sources = [sentence.prompt for sentence in modules.arrivals.sentences(tiny, 4, 1.0)]
    with modules.roster.Roster(modules.roster.Maker(1), tiny, (NAMES[2],)) as roster:
        (peer,) = roster.alive
        assert peer.generate(sources, None, num_beams=2).value == sources
        served = peer.serve(modules.arrivals.sentences(tiny, 3, 100.0), num_beams=2)
        assert len(served.value) == 3


def test_a_peer_that_ends_is_left_out_with_its_last_words(modules: Any) -> None:
    with pytest.raises(modules.peers.PeerError, match=r"a peer: has ended: AttributeError.*NoSuchEngine"):
        modules.peers.Peer("a peer", "NoSuchEngine")


def test_no_run_begins_that_would_end_after_the_budget(modules: Any) -> None:
    harness, runs = modules.harness, []

    class Instant:
        name, is_alive = "instant", True

    def work(_: Instant, run: int) -> Any:
        runs.append(run)
        return modules.peers.Answer(None, 1.0, 1.0)

    harness.alternate([Instant()], work, harness.Effort(3, budget_s=0.0))
    assert runs == [0]


def test_goals_are_met_or_missed_by_the_ratio_of_medians(modules: Any) -> None:
    goals, timing = modules.goals, modules.harness.Timing
    ours, peer = NAMES[0], NAMES[-1]
    results = {
        goals.decode_key("float32", 1): {ours: timing((1.0, 2.0, 1.5)), peer: timing((3.0, 3.0, 3.0))},
        goals.TRANSLATION_P99: {ours: timing((0.9,)), peer: timing((1.0,))},
        goals.START: {"trivium serve": timing((9.0, 7.0, 8.0))},
    }
    measured = [line for line in goals.goals_table(results).splitlines() if "not measured" not in line]
    lines = {line.split(" | ")[0][2:]: line for line in measured}
    assert "| at least 1.2x | **2.00** | 3.00 | 1.50 to 3.00 |  | met |" in lines["decode, float32, batch 1"]
    assert lines["translation, beam 4, arriving, p99 latency"].endswith("missed by 50% |")
    assert lines["start to first token"].endswith("| at most 8 s | **8.00** | 7.00 | 7.00 to 9.00 |  | met |")
    assert "not measured in this run" in goals.goals_table({})
