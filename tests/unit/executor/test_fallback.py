"""Models that have no graph of ours: transformers' own, with our attention, or a refusal that says why."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters import load_peft, save_adapter
from embeds import generate_from, packed, soft_rows
from soft_prompts import load_soft_prompt, peft_greedy, save_soft_prompt
from tiny import load_oracle, save_model
from trivium.config import AdapterModule
from trivium.errors import ConfigurationError
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits

_SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS = {key: _SIZES[key] for key in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")}
_GPT = {**_IDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
_MLA = {
    **_SIZES,
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
RUNNING = {
    "cohere": lambda: transformers.CohereConfig(**_SIZES, logit_scale=0.5, use_qk_norm=True),
    "cohere2": lambda: transformers.Cohere2Config(
        **_SIZES, sliding_window=7, sliding_window_pattern=2, logit_scale=0.5
    ),
    "phi": lambda: transformers.PhiConfig(**_SIZES, partial_rotary_factor=0.5, qk_layernorm=True),
    "olmo": lambda: transformers.OlmoConfig(**_SIZES, clip_qkv=2.0),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**_GPT),
    "biogpt": lambda: transformers.BioGptConfig(**{**_SIZES, "scale_embedding": False}),
    "phimoe": lambda: transformers.PhimoeConfig(**_SIZES, num_local_experts=4, sliding_window=128),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_MLA),
}


def save(kind: str, path: Path, config: Any = None) -> Path:
    config = config or RUNNING[kind]()
    torch.manual_seed(5)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return save_model(getattr(transformers, name)(config), path)


@pytest.fixture(scope="module", params=RUNNING)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = save(request.param, tmp_path_factory.mktemp(request.param))
    return path, load_oracle(path)


def test_logits_equal_transformers(checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, oracle = checkpoint
    scheduler, recorded = MiniScheduler(make_runner(path)), record_logits(monkeypatch)
    prompt = random_ids(23, seed=1)
    request = scheduler.add(prompt, GREEDY)
    scheduler.run()
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([prompt + request.output[:-1]])).logits[0, len(prompt) - 1 :]
    assert len(recorded) == len(request.output) > 1
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


def test_greedy_output_of_a_mixed_batch_equals_generate(checkpoint: tuple[Path, Any]) -> None:
    path, oracle = checkpoint
    scheduler = MiniScheduler(make_runner(path), chunk=5)
    requests = add_random_requests(scheduler, 4)
    scheduler.run()
    expected = [generate(oracle, request) for request in requests]
    assert len({token for output in expected for token in output}) > 3
    assert [request.output for request in requests] == expected


def test_rows_with_and_without_an_adapter_say_what_peft_says(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, oracle = checkpoint
    targets = linear_names(oracle)
    adapters = {name: save_adapter(path, tmp_path / name, targets, seed=index) for index, name in enumerate("ab")}
    modules = tuple(AdapterModule(name, str(adapter)) for name, adapter in adapters.items())
    scheduler = MiniScheduler(make_runner(path, enable_lora=True, lora_modules=modules), chunk=7)
    requests = add_random_requests(scheduler, 4)
    for request, name in zip(requests, ["a", "", "b", "a"], strict=True):
        request.adapter = name
    scheduler.run()
    oracles = {name: load_peft(path, adapter) for name, adapter in adapters.items()}
    expected = [generate(oracles.get(request.adapter, oracle), request) for request in requests]
    assert [request.output for request in requests] == expected
    assert any(generate(oracle, request) != request.output for request in requests)


@pytest.mark.filterwarnings("ignore:Passing `")
def test_soft_prompts_and_embeddings_go_ahead_of_tokens(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, oracle = checkpoint
    has_other_heads = oracle.config.model_type in ("deepseek_v3", "gpt_bigcode", "biogpt")  # than PEFT thinks
    kinds = ["prompt"] if has_other_heads else ["prompt", "prefix"]
    adapters = {kind: save_soft_prompt(path, tmp_path / kind, kind, seed=7) for kind in kinds}
    modules = tuple(AdapterModule(name, str(adapter)) for name, adapter in adapters.items())
    scheduler = MiniScheduler(make_runner(path, enable_prompt_adapter=True, prompt_adapters=modules), chunk=4)
    prompts = [random_ids(3 + 4 * index, seed=index) for index in range(len(kinds))]
    requests = [
        scheduler.add(prompt, prompt_adapter=scheduler.info.find_prompt_adapter(kind))
        for kind, prompt in zip(kinds, prompts, strict=True)
    ]
    rows = soft_rows(oracle, random_ids(9))
    embedded = scheduler.add([0] * len(rows), embeds=packed(rows))
    scheduler.run()
    expected = [
        peft_greedy(load_soft_prompt(path, adapters[kind]), prompt, None, 12)
        for kind, prompt in zip(kinds, prompts, strict=True)
    ]
    assert [request.output for request in requests] == expected
    assert embedded.output == generate_from(path, rows, max_new_tokens=12)


def linear_names(model: Any) -> tuple[str, ...]:
    """The last parts of the names of all linear layers, but the head, and but feed-forwards of a model with experts:
    PEFT would have an adapter change the experts too."""
    names = {name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)}
    if any("experts" in name for name, _ in model.named_parameters()):
        names = {name for name in names if "self_attn" in name}
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def test_the_head_takes_no_adapter(tmp_path: Path) -> None:
    path = save("olmo", tmp_path / "model")
    adapter = save_adapter(path, tmp_path / "adapter", ("q_proj", "lm_head"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "base_layer" not in name},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ConfigurationError, match="target module lm_head is not supported for this model"):
        make_runner(path, enable_lora=True, lora_modules=(AdapterModule("a", str(adapter)),))


def test_one_line_says_that_it_is_slower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save("olmo", tmp_path)
    with caplog.at_level(logging.INFO, "trivium"):
        info = make_runner(path).model_info
    said = [record.getMessage() for record in caplog.records if "OlmoForCausalLM" in record.getMessage()]
    assert said[0] == (
        "OlmoForCausalLM has no graph of its own here: it runs in transformers, slower, with our attention"
    )
    assert sum("slower" in record.getMessage() for record in caplog.records) == 1
    assert (info.architecture, info.vocab_size, info.max_model_len) == ("OlmoForCausalLM", 260, 128)


def test_absent_special_tokens_are_those_of_the_config_class(tmp_path: Path) -> None:
    path = save("olmo", tmp_path)
    (path / "generation_config.json").unlink()
    edit_config(path, eos_token_id=None, pad_token_id=None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if not key.endswith("_token_id")})
    )
    info = make_runner(path).model_info
    assert (info.eos_token_ids, info.pad_token_id, info.bos_token_id) == ((50279,), 1, None)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


_SINKS = {**_SIZES, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}
REFUSED = {
    "state-space": (
        lambda: transformers.MambaConfig(**_IDS, hidden_size=48, num_hidden_layers=2),
        "MambaForCausalLM cannot run here: it keeps a state besides keys and values",
    ),
    "alibi": (
        lambda: transformers.BloomConfig(**_IDS, hidden_size=48, n_layer=2, n_head=6),
        "BloomForCausalLM cannot run here: 0 of its 2 layers go through transformers' attention interface",
    ),
    "own attention": (
        lambda: transformers.GPTJConfig(**_GPT, rotary_dim=4),
        "GPTJForCausalLM cannot run here: ",
    ),
    "sinks": (
        lambda: transformers.GptOssConfig(**_SINKS, rope_parameters={"rope_type": "default", "rope_theta": 90.0}),
        "GptOssForCausalLM cannot run here: its attention takes s_aux, which is not supported",
    ),
    "not causal": (
        lambda: transformers.BertConfig(**_SIZES, is_decoder=False),
        "BertLMHeadModel cannot run here: its attention is not causal",
    ),
    "lost window": (
        lambda: transformers.PhimoeConfig(**_SIZES, num_local_experts=4, sliding_window=8),
        "PhimoeForCausalLM cannot run here: sliding_window 8 does not reach its attention",
    ),
    "linear attention": (
        lambda: transformers.MiniMaxConfig(**_SIZES, num_local_experts=4),
        "layer_types 'linear_attention' is not supported: full_attention, sliding_attention",
    ),
    "dynamic rope": (
        lambda: transformers.OlmoConfig(**_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' makes a request depend on what else runs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make_config, message = REFUSED[case]
    config = make_config()
    path = save(case, tmp_path, config)
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message


def test_code_from_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    path = save("olmo", tmp_path)
    (path / "modeling_own.py").write_text("raise SystemExit('ran')")
    edit_config(path, architectures=["OwnModel"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    with pytest.raises(ConfigurationError, match=r"'OwnModel' needs code from the checkpoint \(auto_map\)"):
        make_runner(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = save("olmo", tmp_path)
    edit_config(path, num_hidden_layers=4)
    with pytest.raises(ConfigurationError, match=r"has no tensor model\.layers\.3\."):
        make_runner(path)


def test_transformers_is_not_imported_for_a_model_with_a_graph_of_its_own(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SIZES)
    path = save_model(transformers.LlamaForCausalLM(config), tmp_path)
    code = (
        "import sys\n"
        "from trivium.config import ExecutorConfig\n"
        "from trivium.executor.model_runner import ModelRunner\n"
        f"ModelRunner(ExecutorConfig(model={str(path)!r}, served_model_name='tiny'))\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
