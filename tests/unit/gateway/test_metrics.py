"""GET /metrics: what was asked and answered, under our names and vLLM's, and what the services hold."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trivium.errors import ContextLengthError, EngineUnavailableError
from trivium.outputs import ChoiceDelta
from trivium.v1.ledger_pb2 import ExecutorLedger, LedgerReply, SchedulerLedger, TokenizerLedger
from trivium_gateway.exposition import LEDGER_ROWS
from trivium_gateway.metrics import Histogram
from unit.gateway import fakes
from unit.gateway.fakes import FakeEngine, Hang, RunningServer, deltas, make_info

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def tiny() -> FakeEngine:
    return FakeEngine(make_info("tiny"))


@pytest.fixture
def server(tiny: FakeEngine) -> Iterator[RunningServer]:
    server = RunningServer({"tiny": tiny, "org/other": FakeEngine(make_info("org/other"))})
    yield server
    server.stop()


def scrape(server: RunningServer) -> Samples:
    """Everything /metrics shows; a series that is there twice fails."""
    answer = fakes.request(server.port, "GET", "/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: Samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def complete(server: RunningServer, **changes: object) -> int:
    body = {"model": "tiny", "prompt": "hi", **changes}
    return fakes.post(server.port, "/v1/completions", body).status


def test_every_series_of_a_served_model_is_there_before_the_first_request(server: RunningServer) -> None:
    samples = scrape(server)
    for model in ("tiny", "org/other"):
        assert value(samples, "trivium_gateway_requests_running", model=model) == 0
        assert value(samples, "trivium_gateway_prompt_tokens_total", model=model) == 0
        for reason in ("stop", "length", "abort", "error"):
            assert value(samples, "vllm:request_success_total", model_name=model, finished_reason=reason) == 0
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
            assert value(samples, f"vllm:{name}_seconds_count", model_name=model) == 0


def test_tokens_and_ends_of_choices_are_counted_under_both_names(server: RunningServer, tiny: FakeEngine) -> None:
    tiny.scripts["long"] = deltas("a", "b", "c", finish=fakes.LENGTH)
    assert complete(server, n=2) == 200  # twice three tokens, and two of the prompt
    assert complete(server, prompt="long", stream=True) == 200
    samples = scrape(server)
    for prefix, label in (("trivium_gateway_", "model"), ("vllm:", "model_name")):
        assert value(samples, f"{prefix}prompt_tokens_total", **{label: "tiny"}) == 2 + 4
        assert value(samples, f"{prefix}generation_tokens_total", **{label: "tiny"}) == 6 + 3
        assert value(samples, f"{prefix}generation_tokens_total", **{label: "org/other"}) == 0
    assert value(samples, "vllm:request_success_total", model_name="tiny", finished_reason="stop") == 2
    assert value(samples, "vllm:request_success_total", model_name="tiny", finished_reason="length") == 1
    assert value(samples, "trivium_gateway_choices_finished_total", model="tiny", finished_reason="stop") == 2


def test_first_and_later_tokens_of_streams_are_timed_and_complete_calls(
    server: RunningServer, tiny: FakeEngine
) -> None:
    tiny.scripts["two"] = [
        ChoiceDelta(0, (65,), "a"),
        *deltas("b", index=1),
        ChoiceDelta(0, (65, 66, 67), "c", fakes.STOP),
    ]
    assert complete(server, prompt="two", n=2, stream=True) == 200
    assert complete(server) == 200
    samples = scrape(server)
    assert value(samples, "vllm:time_to_first_token_seconds_count", model_name="tiny") == 1
    assert value(samples, "vllm:inter_token_latency_seconds_count", model_name="tiny") == 3
    assert value(samples, "vllm:e2e_request_latency_seconds_count", model_name="tiny") == 2
    first, whole = (
        value(samples, f"trivium_gateway_{name}_seconds_sum", model="tiny")
        for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert 0 < first < whole < 5
    assert value(samples, "vllm:e2e_request_latency_seconds_bucket", model_name="tiny", le="+Inf") == 2


def test_responses_are_counted_by_endpoint_model_and_status_with_labels_from_fixed_sets(
    server: RunningServer, tiny: FakeEngine
) -> None:
    tiny.scripts["gone"] = [EngineUnavailableError("away")]
    tiny.scripts["long"] = [ContextLengthError("too long")]
    assert [complete(server), complete(server), complete(server, prompt="gone")] == [200, 200, 503]
    assert complete(server, prompt="long") == 400
    assert complete(server, model="x" * 50) == 404
    assert fakes.request(server.port, "GET", "/v1/" + "y" * 50).status == 404
    samples = scrape(server)

    def responses(endpoint: str, model: str, status: int) -> float:
        name = "trivium_gateway_requests_total"
        return value(samples, name, endpoint=endpoint, model=model, status=str(status))

    assert responses("/v1/completions", "tiny", 200) == 2
    assert responses("/v1/completions", "tiny", 503) == responses("/v1/completions", "tiny", 400) == 1
    assert responses("/v1/completions", "", 404) == responses("other", "", 404) == 1
    assert value(samples, "vllm:request_success_total", model_name="tiny", finished_reason="error") == 1
    assert value(samples, "vllm:prompt_tokens_total", model_name="tiny") == 2 * 2


def test_a_stream_counts_as_running_until_its_client_leaves_and_then_as_an_abort(
    server: RunningServer, tiny: FakeEngine
) -> None:
    tiny.scripts["hang"] = [ChoiceDelta(0, (65,), "a"), Hang()]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    body = json.dumps({"model": "tiny", "prompt": "hang", "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    request_id = tiny.started.get(timeout=5)
    samples = scrape(server)
    assert value(samples, "trivium_gateway_requests_running", model="tiny") == 1
    assert value(samples, "trivium_open_streams", service="gateway", model="") == 1
    assert value(samples, "vllm:generation_tokens_total", model_name="tiny") == 1
    connection.close()
    assert tiny.aborted.get(timeout=5) == request_id
    deadline = time.monotonic() + 5
    while value(samples, "trivium_gateway_requests_running", model="tiny") and time.monotonic() < deadline:
        samples = scrape(server)
    assert value(samples, "trivium_gateway_requests_running", model="tiny") == 0
    assert value(samples, "trivium_open_streams", service="gateway", model="") == 0
    assert value(samples, "vllm:request_success_total", model_name="tiny", finished_reason="abort") == 1
    assert value(samples, "vllm:e2e_request_latency_seconds_count", model_name="tiny") == 0


def test_ledgers_are_shown_by_service_and_model_and_a_silent_service_is_down(
    server: RunningServer, tiny: FakeEngine
) -> None:
    scheduler = SchedulerLedger(
        running_requests=3, waiting_requests=2, blocks_total=8, blocks_held=2, blocks_free=6, preemptions=5,
        prefix_tokens_queried=70, prefix_tokens_hit=30, host_blocks_total=10, host_blocks_free=4, swapped_requests=2,
        swaps=7,
    )  # fmt: skip
    tokenizer = LedgerReply(tokenizer=TokenizerLedger(detokenize_handles=9, models=["tiny", "org/other"]))
    tiny.ledgers = {
        "scheduler": LedgerReply(scheduler=scheduler, threads=7),
        "executor": LedgerReply(executor=ExecutorLedger(occupied_slots=4), open_file_descriptors=0),
        "tokenizer": tokenizer,
    }
    silent = FakeEngine(make_info("silent"))
    silent.ledgers = {"scheduler": None, "executor": None, "tokenizer": None}
    other = RunningServer({"silent": silent, "tiny": tiny})
    try:
        samples = scrape(other)
    finally:
        other.stop()
    up = {
        (service, model): value(samples, "trivium_up", service=service, model=model)
        for service, model in [("scheduler", "tiny"), ("executor", "tiny"), ("tokenizer", ""), ("gateway", ""),
                               ("scheduler", "silent"), ("executor", "silent")]
    }  # fmt: skip
    assert up == {key: float(key[1] != "silent") for key in up}
    assert not [labels for name, labels in samples if ("service", "scheduler") in labels and name != "trivium_up"
                and ("model", "silent") in labels]  # fmt: skip
    assert value(samples, "trivium_scheduler_blocks_held", service="scheduler", model="tiny") == 2
    assert value(samples, "trivium_scheduler_host_blocks_free", service="scheduler", model="tiny") == 4
    assert value(samples, "trivium_scheduler_swaps_total", service="scheduler", model="tiny") == 7
    assert value(samples, "trivium_executor_slots_occupied", service="executor", model="tiny") == 4
    assert value(samples, "trivium_tokenizer_detokenize_handles", service="tokenizer", model="") == 9
    assert value(samples, "trivium_tokenizer_models", service="tokenizer", model="") == 2
    assert value(samples, "trivium_threads", service="scheduler", model="tiny") == 7
    assert value(samples, "trivium_open_file_descriptors", service="executor", model="tiny") == 0
    assert ("trivium_open_file_descriptors", frozenset({("service", "scheduler"), ("model", "tiny")})) not in samples
    assert value(samples, "trivium_open_file_descriptors", service="gateway", model="") > 3
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25, "num_preemptions_total": 5,
        "prefix_cache_queries_total": 70, "prefix_cache_hits_total": 30, "num_requests_swapped": 2,
        "cpu_cache_usage_perc": 0.6,
    }  # fmt: skip
    assert {name: value(samples, f"vllm:{name}", model_name="tiny") for name in expected} == expected
    assert ("vllm:num_requests_running", frozenset({("model_name", "silent")})) not in samples


def test_the_metrics_need_the_key(tiny: FakeEngine) -> None:
    server = RunningServer({"tiny": tiny}, api_key="secret")
    try:
        assert fakes.request(server.port, "GET", "/metrics").status == 401
        answer = fakes.request(server.port, "GET", "/metrics", headers={"Authorization": "Bearer secret"})
        assert answer.status == 200 and b'endpoint="/metrics",model="",status="401"} 1.0' in answer.body
    finally:
        server.stop()


def test_two_applications_count_apart(server: RunningServer) -> None:
    complete(server)
    other = RunningServer({"tiny": FakeEngine(make_info("tiny"))})
    try:
        assert value(scrape(other), "vllm:generation_tokens_total", model_name="tiny") == 0
    finally:
        other.stop()


def test_every_number_of_a_ledger_has_a_metric() -> None:
    shown = {(row.part, row.number) for row in LEDGER_ROWS}
    fields = {("", name) for name in LedgerReply.DESCRIPTOR.fields_by_name}
    fields -= {("", name) for name in ("service", "epoch", "scheduler", "executor", "tokenizer", "peers")}
    for part in ("scheduler", "executor", "tokenizer"):
        message = LedgerReply.DESCRIPTOR.fields_by_name[part].message_type
        fields |= {(part, name) for name in message.fields_by_name}
    assert shown == fields


def test_a_bound_of_a_histogram_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for number, weight in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(number, weight)
    assert histogram.buckets() == [("1.0", 3.0), ("2.0", 4.0), ("+Inf", 7.0)]
    assert histogram.sum == 0.5 + 2 * 1.0 + 1.5 + 3 * 9.0
