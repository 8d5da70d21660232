"""Every family of the decoder-only graph against transformers, in the settings in which checkpoints differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import load_oracle, save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.registry import ARCHITECTURES
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits

_MQA = {"num_key_value_heads": 1, "hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 3}
_BIASED = {"attention_bias": True, "num_key_value_heads": 6, "hidden_act": "gelu"}
_OWN_CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {**_MQA, "tie_word_embeddings": True}, {**_BIASED, "mlp_bias": True, "head_dim": 10}],
    "mistral": [{}, {**_MQA, "sliding_window": None}, {"head_dim": 10, "num_key_value_heads": 6, "sliding_window": 2}],
    "mixtral": [
        {},
        {**_MQA, "num_experts_per_tok": 5, "sliding_window": 6},
        {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ],
    "qwen2": [
        {},
        {**_MQA, "tie_word_embeddings": False},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ],
    "qwen2_moe": [
        {},
        {**_MQA, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
        {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ],
    "qwen3": [
        {},
        {**_MQA, "tie_word_embeddings": True, "attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ],
    "qwen3_moe": [
        {},
        {**_MQA, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
        {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ],
    "gemma": [{}, {**_MQA, "hidden_act": "gelu"}, {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [
        {},
        {**_MQA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "num_hidden_layers": 4},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "silu"},
    ],
    "gemma3": [
        {},
        {**_MQA, "final_logit_softcapping": 4.0, "sliding_window_pattern": 2},
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ],
    "phi3": [
        {},
        {**_MQA, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        {"sliding_window": 6, "num_key_value_heads": 6, "hidden_act": "gelu"},
    ],
    "olmo2": [{}, {**_MQA, "tie_word_embeddings": True}, _BIASED],
    "granite": [{}, {**_MQA, "tie_word_embeddings": True}, {**_BIASED, "mlp_bias": True}],
    "smollm3": [
        {},
        {**_MQA, "no_rope_layers": [1, 0, 0], "tie_word_embeddings": False},
        {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True, "mlp_bias": True},
    ],
    "starcoder2": [{}, {**_MQA, "use_bias": False, "tie_word_embeddings": False}, {"sliding_window": 5}],
    "stablelm": [
        {},
        {**_MQA, "qk_layernorm": True, "use_qkv_bias": True},
        {"use_parallel_residual": True, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
        {"qk_layernorm": True, "use_parallel_residual": True, "num_key_value_heads": 3},
    ],
    "gpt2": [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": None, "n_layer": 3, "tie_word_embeddings": False},
        {"scale_attn_weights": False, "n_head": 1, "activation_function": "relu", "reorder_and_upcast_attn": True},
    ],
    "opt": [
        {},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "num_hidden_layers": 3},  # as opt-350m
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
        {"_remove_final_layer_norm": True, "activation_function": "gelu"},
    ],
    "gpt_neox": [
        {},
        {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
        {"num_attention_heads": 3, "tie_word_embeddings": True, "rotary_pct": 0.25, "rotary_emb_base": 300},
    ],
    "falcon": [
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True, "tie_word_embeddings": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 50},
        {"multi_query": False, "parallel_attn": False, "bias": True, "activation": "relu"},
    ],
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
CASES = [(family, overrides) for family, cases in _OWN_CASES.items() for overrides in cases]


def test_every_family_has_cases() -> None:
    assert set(_OWN_CASES) == set(DECODER_BUILDERS)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((case[0], *case[1])))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(directory, what transformers makes of it)."""
    family, overrides = request.param
    path = save_tiny(family, tmp_path_factory.mktemp(family), seed=3, **overrides)
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
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


def test_greedy_output_alone_and_in_a_mixed_batch_equals_generate(checkpoint: tuple[Path, Any]) -> None:
    path, oracle = checkpoint
    runner = make_runner(path)
    scheduler = MiniScheduler(runner, chunk=5)
    requests = add_random_requests(scheduler, 4)
    scheduler.run()
    expected = [generate(oracle, request) for request in requests]
    assert len({token for output in expected for token in output}) > 3
    assert len({tuple(output) for output in expected}) > 1
    assert [request.output for request in requests] == expected
    runner.reset()
    alone = MiniScheduler(runner)
    request = alone.add(list(requests[-1].prompt))
    alone.run()
    assert request.output == expected[-1]


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("family", DECODER_BUILDERS)
def test_an_empty_config_means_the_defaults_of_transformers(family: str) -> None:
    model, config_kind, _ = DECODER_BUILDERS[family]
    defaults = config_kind().to_dict()
    architecture = ARCHITECTURES[model.__name__]
    read = architecture.build.args[0]  # type: ignore[attr-defined]
    assert read(JsonConfig({})) == read(JsonConfig(defaults))
    expected = {key: defaults[key] for key in _TOKENS if defaults.get(key) is not None}
    assert architecture.default_tokens == expected


def decode_step_by_step(oracle: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy output when it is given one token at a time, so that each sees its own length."""
    tokens, cache = list(prompt), None
    with torch.no_grad():
        for position in range(len(prompt) + num_tokens - 1):
            output = oracle(input_ids=torch.tensor([[tokens[position]]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            if position >= len(prompt) - 1:
                tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


_LONG = {"rope_theta": 50.0, "original_max_position_embeddings": 32}
_SHORT_FACTORS, _LONG_FACTORS = [1.0, 1.1, 1.3, 1.7], [1.2, 1.9, 3.1, 4.0]
_LONGROPE = {"rope_type": "longrope", "short_factor": _SHORT_FACTORS, "long_factor": _LONG_FACTORS, "rope_theta": 50.0}
_SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 70.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **_LONG,
            }
        },
    ),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_LONG}}),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, **_LONG}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 4,
                "beta_slow": 2,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "truncate": False,
                **_LONG,
            }
        },
    ),
    ("gpt_neox", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5, **_LONG}}),
    ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    (
        "phi3",
        {
            "rope_parameters": {**_LONGROPE, "type": "su", "factor": 2.0, "partial_rotary_factor": 1.0},
            "original_max_position_embeddings": 16,
        },
    ),
    (
        "llama",
        {"rope_parameters": {**_LONGROPE, "attention_factor": 1.3, "original_max_position_embeddings": 20}},
    ),
]


@pytest.mark.parametrize(
    ("family", "overrides"), _SCALINGS, ids=lambda value: value if isinstance(value, str) else str(list(value))
)
def test_rope_scalings_past_the_original_context_equal_generate(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    path = save_tiny(family, tmp_path, seed=4, **overrides)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path), chunk=17)
    requests = [scheduler.add(random_ids(length, seed=length)) for length in (40, 75)]
    scheduler.run()
    expected = [generate(oracle, request) for request in requests]
    assert len({token for output in expected for token in output}) > 3
    assert [request.output for request in requests] == expected


def test_dynamic_rope_lengthens_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 50.0}
    path = save_tiny("llama", tmp_path, rope_parameters=rope, max_position_embeddings=24)
    runner = make_runner(path)
    assert runner.model_info.max_model_len == 72
    scheduler = MiniScheduler(runner, chunk=7)
    sampling = replace(GREEDY, max_tokens=20, ignore_eos=True)
    within, beyond = (scheduler.add(random_ids(length, seed=length), sampling) for length in (20, 41))
    scheduler.run()
    assert within.output == decode_step_by_step(load_oracle(path), list(within.prompt), 20)
    assert within.output == generate(load_oracle(path), within)
    assert beyond.output == decode_step_by_step(load_oracle(path), list(beyond.prompt), 20)


def test_longrope_follows_the_context_that_is_served(tmp_path: Path) -> None:
    path = save_tiny("phi3", tmp_path, seed=4, rope_parameters=_LONGROPE, original_max_position_embeddings=32)
    outputs = []
    for max_model_len in (32, 33):
        scheduler = MiniScheduler(make_runner(path, max_model_len=max_model_len))
        request = scheduler.add(random_ids(20))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == generate(load_oracle(path), request)
    assert outputs[0] != outputs[1]


def test_yarn_serves_the_context_it_is_made_for(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "original_max_position_embeddings": 128}
    path = save_tiny("qwen2", tmp_path, rope_parameters=rope)
    assert make_runner(path, kv_cache_memory_bytes=2**24).model_info.max_model_len == 512


def test_gemma_3_in_its_older_spelling_means_the_same(tmp_path: Path) -> None:
    path = save_tiny("gemma3", tmp_path)
    older = {
        "rope_parameters": None,
        "rope_theta": 800.0,
        "rope_local_base_freq": 60.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": None,
        "sliding_window_pattern": 3,
    }
    edit_config(path, **older)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
    request = scheduler.add(random_ids(30))
    scheduler.run()
    assert request.output == generate(oracle, request)
    edit_config(path, rope_theta=8000.0)
    scheduler = MiniScheduler(make_runner(path))
    changed = scheduler.add(list(request.prompt))
    scheduler.run()
    assert changed.output != request.output


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 5, "head_dim": 8},
            "num_attention_heads 5 is not a multiple of num_key_value",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported, only 1.0"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope parameters per layer type are not supported"),
        ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "partial_rotary_factor 0.4 of head size 8"),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 2.0}, "rotary_pct 2.0 of head size 8 cannot be rotated"),
        ("phi3", {"rope_parameters": {**_LONGROPE, "long_factor": [1]}}, "long_factor must be a list of 4 numbers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types 'chunked_attention' is not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must name 3 layers"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping must be positive, got -1"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0 is not supported, only None"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must name 2 layers"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than the 5 experts"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, got 3"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2", {"n_head": 5}, "n_embd 48 is not a multiple of n_head 5"),
        ("opt", {"activation_function": "xielu"}, "activation_function 'xielu' is not supported"),
        ("falcon", {"alibi": True}, "alibi True is not supported, only False"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn false with new_decoder"),
        ("granite", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ("olmo2", {"num_hidden_layers": 3}, "has no tensor model.layers.2.post_attention_layernorm.weight"),
    ],
)
def test_what_cannot_run_is_refused_by_its_name(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_tiny(family, tmp_path)
    edit_config(path, **changes)
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message
