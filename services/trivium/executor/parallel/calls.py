"""The arguments of what the first rank tells the others to do, as they travel.

Plans, grammars and prompts have the form that they have between the services; the rest is JSON. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from trivium import wire
from trivium.config import AdapterModule, ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.model_runner import ModelRunner
from trivium.executor.parallel.frames import Call
from trivium.pooling import PoolingParams, PoolingType
from trivium.step import SchedulerOutput
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import executor_pb2, types_pb2


def config_to_bytes(config: ExecutorConfig) -> bytes:
    """Raises ConfigurationError for an override that is no JSON."""
    try:
        return json.dumps(asdict(config)).encode()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"override_generation_config: {error}") from None


def config_from_bytes(data: bytes) -> ExecutorConfig:
    fields = json.loads(data)
    for kind in ("lora_modules", "prompt_adapters"):
        fields[kind] = tuple(AdapterModule(**module) for module in fields[kind])
    return ExecutorConfig(**fields)


def plan_to_bytes(plan: SchedulerOutput) -> bytes:
    return wire.plan_to_proto(plan).SerializeToString()


def grammar_to_bytes(params: StructuredOutputsParams | None) -> bytes:
    return b"" if params is None else wire.structured_outputs_to_proto(params).SerializeToString()


def embed_to_bytes(prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool) -> bytes:
    params = PoolingParams(pooling_type=kind, normalize=normalize)
    return wire.embed_to_proto("", prompts, params).SerializeToString()


def adapter_to_bytes(name: str, source: str) -> bytes:
    return json.dumps([name, source]).encode()


def repeat_call(runner: ModelRunner, call: Call, arguments: bytes) -> None:
    """Do what the first rank does, for the sake of the tensors that it needs of this one."""
    match call:
        case Call.PLAN:
            runner.execute(wire.plan_from_proto(executor_pb2.StepPlan.FromString(arguments)))
        case Call.RESET:
            runner.reset()
        case Call.GRAMMAR:
            message = types_pb2.StructuredOutputs.FromString(arguments)
            grammar = wire.structured_outputs_from_proto(message) if arguments else None
            runner.prepare_grammar(grammar, lambda error: None)
        case Call.EMBED:
            prompts, params = wire.embed_from_proto(types_pb2.EmbedRequest.FromString(arguments))
            runner.embed(prompts, PoolingType(params.pooling_type or ""), normalize=params.normalize)
        case Call.ADAPTER:
            runner.load_adapter(*json.loads(arguments))
        case Call.PROMPT_ADAPTER:
            runner.load_prompt_adapter(*json.loads(arguments))
        case Call.LOAD:
            raise AssertionError("a call of no runner")
