"""LoRA adapters against PEFT: logits within 1e-4, greedy output token for token, several of them in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import DECODER_TARGETS, load_peft, save_adapter, targets_of
from tiny import BART_LIKE, DECODER_ONLY, T5_LIKE, save_tiny
from trivium.config import AdapterModule, ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.model_runner import ModelRunner
from trivium.executor.plan_check import PlanError
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits

# GPT-2 stores its weights the other way round; GPT-NeoX and Falcon store queries, keys and values in groups.
STACKED = ("gpt2", "phi3", "gpt_neox", "falcon")
FAMILIES = (*DECODER_ONLY, *STACKED, *BART_LIKE, *T5_LIKE)
GROUPED_KEYS = {"falcon": {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True}}


def lora_runner(checkpoint: Path, adapters: dict[str, Path], **settings: Any) -> ModelRunner:
    modules = tuple(AdapterModule(name, str(path)) for name, path in adapters.items())
    return make_runner(checkpoint, enable_lora=True, lora_modules=modules, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(a checkpoint, its adapters)"""
    path = tmp_path_factory.mktemp(request.param)
    family = request.param
    checkpoint, targets = save_tiny(family, path / "model", **GROUPED_KEYS.get(family, {})), targets_of(family)
    adapters = {
        "all": save_adapter(checkpoint, path / "all", targets),
        "some": save_adapter(checkpoint, path / "some", (targets[0], targets[-1]), seed=1, r=7, use_rslora=True),
    }
    return checkpoint, adapters


def test_rows_with_different_adapters_say_what_peft_says(world: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = world
    scheduler = MiniScheduler(lora_runner(checkpoint, adapters), chunk=7)
    names = ["", "all", "some", "all", ""]
    requests = add_random_requests(scheduler, 5)
    for request, name in zip(requests, names, strict=True):
        request.adapter = name
    scheduler.run()
    oracles = {name: load_peft(checkpoint, adapters.get(name)) for name in set(names)}
    expected = [generate(oracles[request.adapter], request) for request in requests]
    assert [request.output for request in requests] == expected
    assert any(generate(oracles[""], request) != request.output for request in requests)  # they do something


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon", "bart", "t5_gated"])
def test_logits_equal_those_of_peft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_tiny(family, tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", targets_of(family))
    oracle, scheduler = load_peft(checkpoint, adapter), MiniScheduler(lora_runner(checkpoint, {"a": adapter}))
    recorded = record_logits(monkeypatch)
    prompt, encoder = random_ids(11), random_ids(17, seed=1) if family in ("bart", "t5_gated") else []
    request = scheduler.add(prompt, GREEDY, encoder=tuple(encoder), adapter="a")
    scheduler.run()
    sequence = torch.tensor([prompt + request.output[:-1]])
    inputs = (
        {"input_ids": torch.tensor([encoder]), "decoder_input_ids": sequence} if encoder else {"input_ids": sequence}
    )
    with torch.no_grad():
        expected = oracle(**inputs).logits[0, len(prompt) - 1 :]
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


def test_ranks_and_scalings_of_single_modules(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    settings = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {r".*\.v_proj": 40}}
    adapter = save_adapter(checkpoint, tmp_path / "adapter", DECODER_TARGETS, **settings)
    scheduler = MiniScheduler(lora_runner(checkpoint, {"a": adapter}))
    requests = add_random_requests(scheduler, 3, adapter="a")
    scheduler.run()
    oracle = load_peft(checkpoint, adapter)
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_a_preempted_row_keeps_its_adapter(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", DECODER_TARGETS)
    scheduler = MiniScheduler(lora_runner(checkpoint, {"a": adapter}))
    plain, adapted = (scheduler.add(random_ids(9), adapter=name) for name in ("", "a"))
    for _ in range(4):
        scheduler.step()
    scheduler.preempt(adapted)
    scheduler.run()
    assert adapted.output == generate(load_peft(checkpoint, adapter), adapted)
    assert plain.output == generate(load_peft(checkpoint, None), plain) != adapted.output


def test_a_slot_forgets_the_adapter_of_the_row_before(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", DECODER_TARGETS)
    scheduler = MiniScheduler(lora_runner(checkpoint, {"a": adapter}, max_num_seqs=1))
    outputs = []
    for name in ("a", ""):
        request = scheduler.add(random_ids(9), adapter=name)
        scheduler.run()
        outputs.append(request.output)
    assert outputs[1] == generate(load_peft(checkpoint, None), request) != outputs[0]


def test_adapters_run_over_packed_weights(tmp_path: Path) -> None:
    from unit.executor.test_quantization import quantized

    path, meant = quantized("llama", "gptq-ordered", tmp_path)
    adapter = save_adapter(meant, tmp_path / "adapter", DECODER_TARGETS)
    scheduler = MiniScheduler(lora_runner(path, {"a": adapter}))
    requests = add_random_requests(scheduler, 3, adapter="a")
    scheduler.run()
    oracle = load_peft(meant, adapter)
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_a_plan_with_an_unknown_adapter_is_refused(tmp_path: Path) -> None:
    scheduler = MiniScheduler(make_runner(save_tiny("llama", tmp_path)))
    scheduler.add(random_ids(9), adapter="a")
    with pytest.raises(PlanError, match="adapter 'a', which is not loaded"):
        scheduler.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported, only 'none'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model's weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_adapter_may_not_have_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", DECODER_TARGETS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigurationError, match=f"adapter 'a': adapter/adapter_config.json: {message}"):
        lora_runner(checkpoint, {"a": adapter})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "lm_head"), "target module lm_head is not supported for this model"),
        (("q_proj", "embed_tokens"), "tensor .*embed_tokens.lora_embedding_A is not LoRA of a linear layer"),
    ],
)
def test_a_target_that_is_no_linear_layer_of_the_graph_is_refused_by_name(
    targets: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", targets)
    tensors = load_file(adapter / "adapter_model.safetensors")
    only_lora = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
    save_file(only_lora, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=message):
        lora_runner(checkpoint, {"a": adapter})


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    good = save_adapter(checkpoint, tmp_path / "good", DECODER_TARGETS)
    wide = save_tiny("llama", tmp_path / "wide", intermediate_size=80)
    bad = save_adapter(wide, tmp_path / "bad", DECODER_TARGETS, seed=2)
    runner = lora_runner(checkpoint, {})
    with pytest.raises(ConfigurationError, match=r"mlp\.\w+_proj of the adapter is for a layer .* the model's is"):
        runner.load_adapter("bad", str(bad))
    runner.load_adapter("good", str(good))
    scheduler = MiniScheduler(runner)
    request = scheduler.add(random_ids(9), adapter="good")
    scheduler.run()
    assert request.output == generate(load_peft(checkpoint, good), request)


def test_a_rank_above_the_limit_and_half_an_adapter_are_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(checkpoint, tmp_path / "adapter", DECODER_TARGETS, r=9)
    with pytest.raises(ConfigurationError, match="has rank 9, more than max_lora_rank 8"):
        lora_runner(checkpoint, {"a": adapter}, max_lora_rank=8)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match="does not have two matrices of one rank"):
        lora_runner(checkpoint, {"a": adapter})
    with pytest.raises(
        ConfigurationError, match=r"adapter 'a': model has no adapter_model.safetensors|no adapter_conf"
    ):
        lora_runner(checkpoint, {"a": checkpoint})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_modules": (AdapterModule("a", "x"),)}, "lora_modules need enable_lora"),
        ({"enable_lora": True, "lora_modules": (AdapterModule("tiny", "x"),)}, "model name 'tiny' is given 2 times"),
        ({"max_loras": 0}, "max_loras must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExecutorConfig(model="x", served_model_name="tiny", **settings)
