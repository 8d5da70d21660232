"""Soft prompts against PEFT: logits within 1e-4, greedy output token for token, several of them in one batch."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import DECODER_TARGETS, save_adapter
from soft_prompts import load_soft_prompt, peft_greedy, peft_logits, save_soft_prompt
from tiny import BART_LIKE, T5_LIKE, save_tiny
from trivium.config import AdapterModule, ExecutorConfig, PromptAdapter
from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor.model_runner import ModelRunner
from trivium.executor.plan_check import PlanError
from trivium.structured_outputs import StructuredOutputsParams
from unit.executor.mini_scheduler import GREEDY, MiniRequest, MiniScheduler
from unit.executor.parity import make_runner, random_ids, record_logits

# PEFT guesses the shape of a prefix from the encoder, and T5's heads from the width of the model.
BART_EVEN = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
T5_EVEN = {"d_kv": 8, "num_decoder_layers": 3}
FALCON_EVEN = {"multi_query": False}
EVEN = {**dict.fromkeys(BART_LIKE, BART_EVEN), **dict.fromkeys(T5_LIKE, T5_EVEN), "falcon": FALCON_EVEN}
# What differs: scales and norms of embeddings, positions, heads, padding, biases, where an encoder scales its tokens.
DECODERS = ("llama", "qwen3", "gemma2", "granite", "gpt2", "opt", "falcon")
FAMILIES = (*DECODERS, "bart", "marian", "m2m_100", "blenderbot_small", "t5", "umt5")
PADDED = [0, *random_ids(9, seed=4), 0, 7]  # with padding tokens, whose place some families give away


def soft_runner(checkpoint: Path, adapters: dict[str, Path], **settings: Any) -> ModelRunner:
    modules = tuple(AdapterModule(name, str(path)) for name, path in adapters.items())
    return make_runner(checkpoint, enable_prompt_adapter=True, prompt_adapters=modules, **settings)


def save_unforced(family: str, path: Path, **overrides: Any) -> Path:
    """A checkpoint without forced tokens, which a forward pass does not know."""
    save_tiny(family, path, **overrides)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((path / name).read_text())
        forced = {"forced_bos_token_id": None, "forced_eos_token_id": None}
        (path / name).write_text(json.dumps({**values, **forced}))
    return path


def add(scheduler: MiniScheduler, name: str, ids: list[int], **fields: Any) -> MiniRequest:
    """A request with `ids` for its prompt or encoder input."""
    adapter = scheduler.info.find_prompt_adapter(name)
    if not scheduler.info.is_encoder_decoder:
        return scheduler.add(ids, prompt_adapter=adapter, **fields)
    start = scheduler.info.decoder_start_token_id
    assert start is not None
    return scheduler.add([start], encoder=tuple(ids), prompt_adapter=adapter, **fields)


def greedy(oracle: Any, request: MiniRequest) -> list[int]:
    assert request.sampling.max_tokens is not None
    return peft_greedy(oracle, list(request.prompt), list(request.encoder), request.sampling.max_tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(a checkpoint, its soft prompts)"""
    path = tmp_path_factory.mktemp(request.param)
    checkpoint = save_unforced(request.param, path / "model", **EVEN.get(request.param, {}))
    return checkpoint, {
        "prompt": save_soft_prompt(checkpoint, path / "prompt"),
        "prefix": save_soft_prompt(checkpoint, path / "prefix", "prefix", num_tokens=6, seed=1),
    }


def test_rows_with_different_soft_prompts_say_what_peft_says(world: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = world
    scheduler = MiniScheduler(soft_runner(checkpoint, adapters), chunk=4)
    names = ["", "prompt", "prefix", "prompt", "prefix"]
    requests = [add(scheduler, name, PADDED[: 12 - 2 * index]) for index, name in enumerate(names)]
    scheduler.run()
    oracles = {name: load_soft_prompt(checkpoint, adapters.get(name)) for name in set(names)}
    expected = [greedy(oracles[name], request) for name, request in zip(names, requests, strict=True)]
    assert [request.output for request in requests] == expected
    assert any(greedy(oracles[""], request) != request.output for request in requests[1:])  # they do something


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_logits_equal_those_of_peft(
    world: tuple[Path, dict[str, Path]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, adapters = world
    scheduler = MiniScheduler(soft_runner(checkpoint, {kind: adapters[kind]}))
    recorded = record_logits(monkeypatch)
    request = add(scheduler, kind, PADDED)
    scheduler.run()
    sequence = [*request.prompt, *request.output[:-1]]
    expected = peft_logits(load_soft_prompt(checkpoint, adapters[kind]), sequence, list(request.encoder))
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected[len(request.prompt) - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("p_tuning", {}),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM"}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 12}),
        ("multitask", {"num_tasks": 1, "num_ranks": 3, "num_transformer_submodules": 1}),
    ],
    ids=str,
)
def test_what_was_trained_in_another_form_is_saved_as_plain_tokens(
    kind: str, settings: dict[str, Any], family: str, tmp_path: Path
) -> None:
    checkpoint = save_unforced(family, tmp_path / "model", **EVEN.get(family, {}))
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter", kind, **settings)
    scheduler = MiniScheduler(soft_runner(checkpoint, {"a": adapter}))
    request = add(scheduler, "a", PADDED)
    scheduler.run()
    oracle = load_soft_prompt(checkpoint, adapter)
    if kind == "multitask" and family != "llama":  # PEFT's forward leaves out the decoder's ids, its generate does not
        ids, task = torch.tensor([PADDED]), torch.tensor([0])
        assert request.output == oracle.generate(input_ids=ids, task_ids=task, max_new_tokens=12)[0, 1:].tolist()
    else:
        assert request.output == greedy(oracle, request)


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_preempted_row_keeps_its_soft_prompt(kind: str, family: str, tmp_path: Path) -> None:
    checkpoint = save_unforced(family, tmp_path / "model", **EVEN.get(family, {}))
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter", kind)
    scheduler = MiniScheduler(soft_runner(checkpoint, {"a": adapter}), chunk=3)
    request = add(scheduler, "a", PADDED)
    for num_steps in (1, 4, 7):  # within the virtual tokens, within the prompt, and after it
        for _ in range(num_steps):
            scheduler.step()
        scheduler.preempt(request)
    scheduler.run()
    assert request.output == greedy(load_soft_prompt(checkpoint, adapter), request)


def test_a_slot_forgets_the_soft_prompt_of_the_row_before(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapters = {kind: save_soft_prompt(checkpoint, tmp_path / kind, kind) for kind in ("prompt", "prefix")}
    scheduler = MiniScheduler(soft_runner(checkpoint, adapters, max_num_seqs=1))
    outputs = []
    for name in ("prefix", "", "prompt", ""):
        request = add(scheduler, name, PADDED)
        scheduler.run()
        outputs.append(request.output)
    assert outputs[1] == outputs[3] == greedy(load_soft_prompt(checkpoint, None), request)
    assert outputs[0] != outputs[1] != outputs[2]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_lora_adapter_beside_a_soft_prompt(kind: str, tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    lora = save_adapter(checkpoint, tmp_path / "lora", DECODER_TARGETS)
    soft = save_soft_prompt(checkpoint, tmp_path / "soft", kind)
    modules = (AdapterModule("lora", str(lora)),)
    scheduler = MiniScheduler(soft_runner(checkpoint, {"soft": soft}, enable_lora=True, lora_modules=modules))
    both, one = (add(scheduler, "soft", PADDED, adapter=adapter) for adapter in ("lora", ""))
    scheduler.run()
    merged = load_soft_prompt(checkpoint, lora).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert both.output == greedy(load_soft_prompt(tmp_path / "merged", soft), both) != one.output


PENALTIES: list[dict[str, Any]] = [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}]


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
def test_penalties_see_the_tokens_and_not_the_virtual_ones(settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model", seed=5)
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter", "prefix")
    scheduler = MiniScheduler(soft_runner(checkpoint, {"a": adapter}))
    sampling = replace(GREEDY, max_tokens=24, ignore_eos=True, **settings)
    request = add(scheduler, "a", PADDED, sampling=sampling)
    scheduler.run()
    ids = torch.tensor([PADDED])
    expected = load_soft_prompt(checkpoint, adapter).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    assert request.output == expected[0, len(PADDED) :].tolist()


def test_a_forced_bos_comes_first_whatever_prefix_a_decoder_has(tmp_path: Path) -> None:
    checkpoint = save_tiny("bart", tmp_path / "model", **BART_EVEN)
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter", "prefix")
    scheduler = MiniScheduler(soft_runner(checkpoint, {"a": adapter}))
    request = add(scheduler, "a", PADDED)
    scheduler.run()
    assert request.output[0] == 1


def test_a_plan_with_an_unknown_soft_prompt_is_refused(tmp_path: Path) -> None:
    scheduler = MiniScheduler(make_runner(save_tiny("llama", tmp_path)))
    scheduler.add(PADDED, prompt_adapter=PromptAdapter("a", 3))
    with pytest.raises(PlanError, match="prompt adapter 'a', which is not loaded"):
        scheduler.step()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "CPT"}, "peft_type 'CPT' is not supported, only PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING"),
    ({"peft_type": "LORA"}, "this is a LoRA adapter, not a soft prompt"),
    ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'SEQ_2_SEQ_LM' is not this model's, which is CAUSAL_LM"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    ({"num_virtual_tokens": 9}, "num_virtual_tokens 9 is more than max_prompt_adapter_token 8"),
    ({"num_virtual_tokens": 4}, r"the virtual tokens have shape \[5, 48\], but 4 of this model are \[4, 48\]"),
    ({"peft_type": "PREFIX_TUNING", "num_layers": 2, "num_attention_heads": 2}, r"the prefix has shape \[5, 48\]"),
    ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "prefix_task_cols and prefix_task_rows are missing"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_soft_prompt_may_not_be_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigurationError, match=f"prompt adapter 'a': adapter/adapter_config.json: {message}"):
        soft_runner(checkpoint, {"a": adapter}, max_prompt_adapter_token=8)


def test_a_file_without_virtual_tokens_and_many_tasks_are_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    many = save_soft_prompt(checkpoint, tmp_path / "many", "multitask", num_tasks=2)
    with pytest.raises(ConfigurationError, match="num_tasks 2 is not supported, only 1"):
        soft_runner(checkpoint, {"a": many})
    tensors = load_file(many / "adapter_model.safetensors")
    tensors.pop("prompt_embeddings")
    save_file(tensors, many / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match="there is no matrix prompt_embeddings"):
        soft_runner(checkpoint, {"a": many})


def test_a_prefix_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    checkpoint = save_tiny("bart", tmp_path / "model")  # 4 heads in the encoder, 2 in the decoder
    adapter = save_soft_prompt(checkpoint, tmp_path / "adapter", "prefix")
    with pytest.raises(ConfigurationError, match="of 2 layers and 4 heads, but the decoder has 2 layers and 2 key"):
        soft_runner(checkpoint, {"a": adapter})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_adapters": (AdapterModule("a", "x"),)}, "prompt_adapters need enable_prompt_adapter"),
        (
            {
                "enable_lora": True,
                "lora_modules": (AdapterModule("a", "x"),),
                "enable_prompt_adapter": True,
                "prompt_adapters": (AdapterModule("a", "y"),),
            },
            "model name 'a' is given 2 times",
        ),
        ({"max_prompt_adapters": 0}, "max_prompt_adapters must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExecutorConfig(model="x", served_model_name="tiny", **settings)


def test_a_grammar_begins_behind_a_forced_token_when_a_row_with_a_prefix_comes_back(tmp_path: Path) -> None:
    checkpoint = save_tiny("bart", tmp_path / "model", with_tokenizer=True, **BART_EVEN)
    adapter = save_soft_prompt(checkpoint, tmp_path / "prefix", "prefix", num_tokens=6)
    scheduler = MiniScheduler(soft_runner(checkpoint, {"prefix": adapter}))
    grammar = StructuredOutputsParams(regex="[a-f]{20}")
    compiled: Future[InvalidRequestError | None] = Future()
    scheduler.runner.prepare_grammar(grammar, compiled.set_result)
    assert compiled.result(30) is None
    request = add(scheduler, "prefix", PADDED, sampling=replace(GREEDY, structured_outputs=grammar))
    for _ in range(4):
        scheduler.step()
    assert request.output[0] == scheduler.info.forced_bos_token_id
    scheduler.preempt(request)
    while not request.finished:
        assert not scheduler.step().failures
