"""GET /metrics: the gateway's own numbers and, asked in that moment, what every service behind it holds.

Text format of Prometheus. Our names begin with `trivium_`; numbers that vLLM has too are there a second time under its
name (`vllm:*`, label `model_name`), so that dashboards and autoscalers made for it work unchanged. A service that does
not answer in time is absent, and `trivium_up` of it is 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from trivium.ledger import ProcessLedger
from trivium.v1.ledger_pb2 import LedgerReply
from trivium_gateway.metrics import GatewayMetrics, Histogram, ModelMetrics
from trivium_gateway.routing import ModelRoutes

GATEWAY = "gateway"
SHARED_SERVICES = frozenset({"tokenizer"})  # one for all models: shown once, without a model

Ledgers = dict[tuple[str, str], LedgerReply | None]  # (service, model) -> its answer


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """How one number of a ledger is shown. part: "" for what every service has, else the field that holds it."""

    part: str
    number: str
    name: str
    text: str
    is_total: bool = False
    vllm_name: str = ""

    def read(self, reply: LedgerReply) -> float | None:
        """The number, or None if `reply` has none."""
        if self.part and not reply.HasField(self.part):
            return None
        owner = getattr(reply, self.part) if self.part else reply
        described = owner.DESCRIPTOR.fields_by_name[self.number]
        if described.has_presence and not owner.HasField(self.number):
            return None
        value = getattr(owner, self.number)
        return float(value if isinstance(value, int | float) else len(value))


def _process(number: str, name: str, text: str) -> LedgerRow:
    return LedgerRow("", number, f"trivium_{name}", text)


def _scheduler(number: str, name: str, text: str, *, is_total: bool = False, vllm_name: str = "") -> LedgerRow:
    return LedgerRow("scheduler", number, f"trivium_scheduler_{name}", text, is_total, vllm_name)


LEDGER_ROWS = (
    _process("uptime_s", "uptime_seconds", "Age of the process"),
    _process("open_streams", "open_streams", "Calls of streaming methods that have not ended"),
    _process("asyncio_tasks", "asyncio_tasks", "Tasks of the event loop"),
    _process("threads", "threads", "Threads of the process"),
    _process("open_file_descriptors", "open_file_descriptors", "Open file descriptors of the process"),
    _process("resident_memory_bytes", "resident_memory_bytes", "Resident memory of the process"),
    _scheduler("running_requests", "requests_running", "Choices in the batch", vllm_name="num_requests_running"),
    _scheduler("waiting_requests", "requests_waiting", "Choices in the queue", vllm_name="num_requests_waiting"),
    _scheduler("waiting_tokens", "tokens_waiting", "Prompt tokens of the choices in the queue"),
    _scheduler("blocks_total", "blocks", "KV blocks of the pool"),
    _scheduler("blocks_free", "blocks_free", "KV blocks that no request holds"),
    _scheduler("blocks_held", "blocks_held", "KV blocks that requests hold"),
    _scheduler("blocks_cached", "blocks_cached", "KV blocks, held or free, that can be found by their contents"),
    _scheduler("blocks_cross", "blocks_cross", "Held KV blocks that are for cross-attention"),
    _scheduler("preemptions", "preemptions", "Preemptions", is_total=True, vllm_name="num_preemptions"),
    _scheduler(
        "prefix_tokens_queried",
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache",
        is_total=True,
        vllm_name="prefix_cache_queries",
    ),
    _scheduler(
        "prefix_tokens_hit",
        "prefix_cache_hits",
        "Tokens found in the prefix cache",
        is_total=True,
        vllm_name="prefix_cache_hits",
    ),
    _scheduler("host_blocks_total", "host_blocks", "Blocks of host memory to swap to"),
    _scheduler("host_blocks_free", "host_blocks_free", "Blocks of host memory that hold nothing"),
    _scheduler(
        "swapped_requests",
        "requests_swapped",
        "Choices in the queue with KV in host memory",
        vllm_name="num_requests_swapped",
    ),
    _scheduler("swaps", "swaps", "Preemptions that saved KV in host memory", is_total=True),
    _scheduler("sessions", "sessions", "Open Session streams"),
    LedgerRow("executor", "occupied_slots", "trivium_executor_slots_occupied", "Rows of the standing batch"),
    LedgerRow("executor", "steps_done", "trivium_executor_steps", "Steps done", is_total=True),
    LedgerRow("executor", "kv_pool_bytes", "trivium_executor_kv_pool_bytes", "Size of the KV pool"),
    LedgerRow("tokenizer", "detokenize_handles", "trivium_tokenizer_detokenize_handles", "Open detokenize handles"),
    LedgerRow("tokenizer", "models", "trivium_tokenizer_models", "Models whose tokenizer is loaded"),
)


class MetricsEndpoint:
    """The handler of GET /metrics."""

    def __init__(self, routes: ModelRoutes, metrics: GatewayMetrics) -> None:
        self._routes = routes
        self._metrics = metrics
        self._process = ProcessLedger()

    async def get(self, request: Request) -> Response:
        ledgers = await ask_ledgers(self._routes)
        ledgers[GATEWAY, ""] = self._own_ledger()
        registry = CollectorRegistry()
        registry.register(_Families([*gateway_families(self._metrics), *ledger_families(ledgers)]))
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    def _own_ledger(self) -> LedgerReply:
        reply = self._process.reply(GATEWAY, epoch=0)
        reply.open_streams = sum(model.num_streams for model in self._metrics.models.values())
        return reply


class _Families(Collector):
    """What one scrape shows."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def ask_ledgers(routes: ModelRoutes) -> Ledgers:
    """The ledgers of all services of all models, asked at the same time."""
    names = routes.names()
    answers = await asyncio.gather(*(routes.find(name).ledger() for name in names))
    ledgers: Ledgers = {}
    for name, answer in zip(names, answers, strict=True):
        for service, reply in answer.items():
            key = service, "" if service in SHARED_SERVICES else name
            ledgers[key] = ledgers.get(key) or reply
    return ledgers


def ledger_families(ledgers: Ledgers) -> Iterator[Metric]:
    labels = ("service", "model")
    up = GaugeMetricFamily("trivium_up", "Whether the service answered this scrape", labels=labels)
    for key, reply in ledgers.items():
        up.add_metric(key, float(reply is not None))
    yield up
    for row in LEDGER_ROWS:
        family = CounterMetricFamily if row.is_total else GaugeMetricFamily
        read = {key: row.read(reply) for key, reply in ledgers.items() if reply is not None}
        values = {key: value for key, value in read.items() if value is not None}
        ours = family(row.name, row.text, labels=labels)
        for key, value in values.items():
            ours.add_metric(key, value)
        yield ours
        if row.vllm_name:
            alias = family(f"vllm:{row.vllm_name}", row.text, labels=("model_name",))
            for (_, model), value in values.items():
                alias.add_metric((model,), value)
            yield alias
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV blocks that is held", labels=("model_name",))
    host = GaugeMetricFamily(
        "vllm:cpu_cache_usage_perc", "Share of the host blocks that is held", labels=("model_name",)
    )
    for (_, model), reply in ledgers.items():
        if reply is not None and reply.scheduler.blocks_total:
            usage.add_metric((model,), reply.scheduler.blocks_held / reply.scheduler.blocks_total)
        if reply is not None and reply.scheduler.host_blocks_total:
            host.add_metric((model,), 1 - reply.scheduler.host_blocks_free / reply.scheduler.host_blocks_total)
    yield usage
    yield host


def gateway_families(metrics: GatewayMetrics) -> Iterator[Metric]:
    responses = CounterMetricFamily(
        "trivium_gateway_requests", "Requests answered", labels=("endpoint", "model", "status")
    )
    for (endpoint, model, status), count in metrics.responses.items():
        responses.add_metric((endpoint, model, str(status)), count)
    yield responses
    yield CounterMetricFamily(
        "trivium_gateway_unknown_fields", "Fields of requests that were ignored", value=metrics.num_unknown_fields
    )
    running = GaugeMetricFamily("trivium_gateway_requests_running", "API calls that generate", labels=("model",))
    for name, of_model in metrics.models.items():
        running.add_metric((name,), of_model.num_running)
    yield running
    yield from _totals(metrics, "prompt_tokens", "Prompt tokens of calls with output", lambda of: of.num_prompt_tokens)
    yield from _totals(metrics, "generation_tokens", "Tokens generated", lambda of: of.num_generation_tokens)
    for name, label in (("trivium_gateway_choices_finished", "model"), ("vllm:request_success", "model_name")):
        finished = CounterMetricFamily(name, "Choices by how they ended", labels=(label, "finished_reason"))
        for model, of_model in metrics.models.items():
            for reason, count in of_model.finished.items():
                finished.add_metric((model, reason), count)
        yield finished
    yield from _histograms(
        metrics, "time_to_first_token", "Of streamed calls, from the request on", lambda of: of.first_token_s
    )
    yield from _histograms(
        metrics, "inter_token_latency", "Of streamed calls, between the tokens of a choice", lambda of: of.inter_token_s
    )
    yield from _histograms(metrics, "e2e_request_latency", "Of complete calls", lambda of: of.call_s)


def _totals(
    metrics: GatewayMetrics, name: str, text: str, read: Callable[[ModelMetrics], float]
) -> Iterator[CounterMetricFamily]:
    for full_name, label in ((f"trivium_gateway_{name}", "model"), (f"vllm:{name}", "model_name")):
        family = CounterMetricFamily(full_name, text, labels=(label,))
        for model, of_model in metrics.models.items():
            family.add_metric((model,), read(of_model))
        yield family


def _histograms(
    metrics: GatewayMetrics, name: str, text: str, read: Callable[[ModelMetrics], Histogram]
) -> Iterator[HistogramMetricFamily]:
    for full_name, label in ((f"trivium_gateway_{name}", "model"), (f"vllm:{name}", "model_name")):
        family = HistogramMetricFamily(f"{full_name}_seconds", text, labels=(label,))
        for model, of_model in metrics.models.items():
            histogram = read(of_model)
            family.add_metric((model,), buckets=histogram.buckets(), sum_value=histogram.sum)
        yield family
