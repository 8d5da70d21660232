"""Every constructor argument of the offline classes works, holds already, or is refused by its name."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from trivium.engine_args import HOLDS, REFUSED, EngineArgs, read_engine_args
from trivium.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]

# a value that is not the default -> what it becomes: (part of the configuration, name there, value there)
WORKING: dict[str, tuple[Any, tuple[str, str, Any]]] = {
    "tokenizer": ("other", ("args", "tokenizer_source", "other")),
    "skip_tokenizer_init": (True, ("args", "skip_tokenizer_init", True)),
    "dtype": ("float", ("executor", "dtype", "float")),
    "device": ("cpu", ("executor", "device", "cpu")),
    "revision": ("v1", ("executor", "revision", "v1")),
    "tokenizer_revision": ("v2", ("args", "tokenizer_source_revision", "v2")),
    "served_model_name": ("name", ("executor", "served_model_name", "name")),
    "seed": (7, ("args", "seed", 7)),
    "max_model_len": (99, ("executor", "max_model_len", 99)),
    "max_num_seqs": (3, ("executor", "max_num_seqs", 3)),
    "max_num_batched_tokens": (77, ("executor", "max_num_batched_tokens", 77)),
    "block_size": (8, ("executor", "block_size", 8)),
    "kv_cache_memory_bytes": (4096, ("executor", "kv_cache_memory_bytes", 4096)),
    "gpu_memory_utilization": (0.5, ("executor", "gpu_memory_utilization", 0.5)),
    "swap_space": (2, ("executor", "swap_space_gib", 2)),
    "quantization": ("int8", ("executor", "quantization", "int8")),
    "enforce_eager": (True, ("executor", "enforce_eager", True)),
    "num_threads": (2, ("executor", "num_threads", 2)),
    "tensor_parallel_size": (2, ("executor", "tensor_parallel_size", 2)),
    "enable_prefix_caching": (False, ("scheduler", "enable_prefix_caching", False)),
    "scheduling_policy": ("priority", ("scheduler", "scheduling_policy", "priority")),
    "max_num_queued_reqs": (5, ("scheduler", "max_waiting_requests", 5)),
    "max_num_queued_tokens": (6, ("scheduler", "max_waiting_tokens", 6)),
    "disable_async_output_proc": (True, ("scheduler", "max_plans_in_flight", 1)),
    "async_scheduling": (False, ("scheduler", "max_plans_in_flight", 1)),
    "max_logprobs": (2, ("args", "max_logprobs", 2)),
    "generation_config": ("none", ("executor", "generation_config", "none")),
    "override_generation_config": ({"num_beams": 2}, ("executor", "override_generation_config", {"num_beams": 2})),
    "enable_lora": (True, ("executor", "enable_lora", True)),
    "max_lora_rank": (4, ("executor", "max_lora_rank", 4)),
    "max_loras": (2, ("executor", "max_loras", 2)),
    "enable_prompt_adapter": (True, ("executor", "enable_prompt_adapter", True)),
    "max_prompt_adapters": (2, ("executor", "max_prompt_adapters", 2)),
    "max_prompt_adapter_token": (64, ("executor", "max_prompt_adapter_token", 64)),
    "enable_prompt_embeds": (True, ("args", "enable_prompt_embeds", True)),
    "task": ("embed", ("args", "task", "embed")),
    "runner": ("pooling", ("args", "runner", "pooling")),
}


def test_every_field_is_tried_below() -> None:
    assert set(EngineArgs.__dataclass_fields__) == {"model", *WORKING}
    assert not set(WORKING) & (set(HOLDS) | set(REFUSED)) and not set(HOLDS) & set(REFUSED)


@pytest.mark.parametrize("name", WORKING)
def test_what_works_reaches_its_place(name: str) -> None:
    value, (part, field, expected) = WORKING[name]
    args = read_engine_args("m", {name: value})
    place = {"args": args, "executor": args.executor_config(), "scheduler": args.scheduler_config()}[part]
    assert getattr(place, field) == expected
    default = EngineArgs(model="m")
    places = {"args": default, "executor": default.executor_config(), "scheduler": default.scheduler_config()}
    assert getattr(places[part], field) != expected or name in ("device",) or (name, value) in (("task", "embed"),)


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds_already_is_said_once_in_the_log(name: str, caplog: pytest.LogCaptureFixture) -> None:
    types, reason = HOLDS[name]
    with caplog.at_level(logging.INFO, "trivium.engine_args"):
        read_engine_args("m", {name: types[0](1)})
    assert [record.message for record in caplog.records if name in record.message and reason in record.message]
    with pytest.raises(ConfigurationError, match=name):
        read_engine_args("m", {name: "text"})


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_its_name_and_why(name: str) -> None:
    unused, reason = REFUSED[name]
    for value in unused:
        read_engine_args("m", {name: value})
    for value in (True, 2, "x", {"a": 1}, object()):
        if not any(type(value) is type(item) and value == item for item in unused):
            with pytest.raises(ConfigurationError, match=f"^{name}=.*{re.escape(reason)}"):
                read_engine_args("m", {name: value})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_model_len": "long"}, "max_model_len"),
        ({"max_logprobs": 21}, "max_logprobs"),
        ({"seed": 1.5}, "seed"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching"),
        ({"task": "classify"}, "task 'classify'"),
        ({"runner": "draft"}, "runner 'draft'"),
        ({"override_generation_config": {"nonsense": 1}}, "nonsense"),
        ({"disable_async_output_proc": True, "async_scheduling": True}, "contradict"),
        *(({name: object()}, f"^{name} must be .*, got <object") for name in WORKING if name not in ("task", "runner")),
        ({"max_model_len": True}, "max_model_len must be a number or 'auto', got True"),
        ({"swap_space": "4"}, "swap_space must be a number of GiB, got '4'"),
        ({"kv_cache_memory_bytes": 1.5}, "kv_cache_memory_bytes must be an integer or None, got 1.5"),
        ({"served_model_name": ["a", "b"]}, "served_model_name must be text"),
    ],
)
def test_a_wrong_value_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        read_engine_args("m", given)


def test_numbers_that_are_not_used_may_be_written_as_floats() -> None:
    read_engine_args("m", {"cpu_offload_gb": 0.0, "shutdown_timeout": 0.0})  # vLLM's own are floats
    with pytest.raises(ConfigurationError, match="cpu_offload_gb=False"):
        read_engine_args("m", {"cpu_offload_gb": False})


def test_an_unknown_name_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        read_engine_args("m", {"max_num_seq": 1})


def test_a_tokenizer_from_elsewhere_does_not_take_the_models_revision() -> None:
    assert EngineArgs(model="m", revision="v1").tokenizer_source_revision == "v1"
    assert EngineArgs(model="m", tokenizer="t", revision="v1").tokenizer_source_revision is None
    assert EngineArgs(model="m", max_model_len="auto").executor_config().max_model_len is None


def test_the_page_for_users_names_every_argument() -> None:
    page = (ROOT / "docs" / "offline.md").read_text()
    missing = [name for name in (*WORKING, *HOLDS, *REFUSED) if f"`{name}`" not in page]
    assert not missing
    for name, (_, reason) in REFUSED.items():
        assert re.search(rf"`{name}`.*{re.escape(reason)}", page), name
