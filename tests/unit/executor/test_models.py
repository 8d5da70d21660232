"""Every family against transformers: logits within 1e-4 in float32, greedy output token for token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import FAMILIES, load_oracle, save_tiny
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_of_prefill_and_decode_equal_transformers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, oracle = make_runner(checkpoint), load_oracle(checkpoint)
    scheduler = MiniScheduler(runner)
    recorded = record_logits(monkeypatch)
    prompt, encoder = random_ids(21), random_ids(33, seed=1) if oracle.config.is_encoder_decoder else []
    request = scheduler.add(prompt, GREEDY, encoder=tuple(encoder))
    scheduler.run()
    sequence = torch.tensor([prompt + request.output[:-1]])
    with torch.no_grad():
        if encoder:
            logits = oracle(input_ids=torch.tensor([encoder]), decoder_input_ids=sequence).logits
        else:
            logits = oracle(input_ids=sequence).logits
    expected = logits[0, len(prompt) - 1 :]
    assert len(recorded) == len(request.output) > 1
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_output_of_a_mixed_batch_equals_generate(checkpoint: Path, chunk: int | None) -> None:
    oracle, scheduler = load_oracle(checkpoint), MiniScheduler(make_runner(checkpoint), chunk=chunk)
    requests = add_random_requests(scheduler)
    scheduler.run()
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_rows_that_join_later_do_not_change_the_others(checkpoint: Path) -> None:
    runner = make_runner(checkpoint)
    alone = []
    for index in range(3):
        scheduler = MiniScheduler(runner)
        request = add_random_requests(scheduler, 3)[index]
        scheduler.waiting = [request]
        scheduler.run()
        alone.append(request.output)
        runner.reset()
    scheduler = MiniScheduler(runner, chunk=5)
    requests = add_random_requests(scheduler, 3)
    late = scheduler.waiting[1:]
    scheduler.waiting = scheduler.waiting[:1]
    for request in late:
        scheduler.step()
        scheduler.waiting.append(request)
    scheduler.run()
    assert [request.output for request in requests] == alone


def test_a_preempted_row_continues_as_if_nothing_had_happened(checkpoint: Path) -> None:
    runner = make_runner(checkpoint)
    undisturbed = MiniScheduler(runner)
    expected = add_random_requests(undisturbed)
    undisturbed.run()
    runner.reset()
    scheduler = MiniScheduler(runner)
    requests = add_random_requests(scheduler)
    for _ in range(4):
        scheduler.step()
    scheduler.preempt(requests[2])
    scheduler.step()
    scheduler.run()
    assert [request.output for request in requests] == [request.output for request in expected]


def test_a_row_resumed_from_its_output_ids_ends_the_same(checkpoint: Path) -> None:
    runner = make_runner(checkpoint)
    scheduler = MiniScheduler(runner)
    requests = add_random_requests(scheduler)
    scheduler.run()
    runner.reset()
    scheduler = MiniScheduler(runner)
    resumed = [
        scheduler.add(list(request.prompt), encoder=request.encoder, output=request.output[: 1 + index % 3])
        for index, request in enumerate(requests)
    ]
    scheduler.run()
    assert [request.output for request in resumed] == [request.output for request in requests]


@pytest.mark.parametrize("family", ["llama", "t5_gated"])
def test_a_row_ends_at_eos_where_generate_ends(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    scheduler = MiniScheduler(make_runner(path))
    eos = add_random_requests(scheduler, 3)[2]
    scheduler.run()
    config = path / "generation_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 2', f'"eos_token_id": [2, {eos.output[3]}]'))
    scheduler = MiniScheduler(make_runner(path))
    request = add_random_requests(scheduler, 3)[2]
    scheduler.run()
    assert request.output == generate(load_oracle(path), request) == eos.output[: eos.output.index(eos.output[3]) + 1]
    assert len(request.output) < len(eos.output)


@pytest.mark.parametrize("prompt_length", [1, 2])
def test_bart_forces_bos_after_a_prompt_of_one_token_and_eos_at_the_limit(tmp_path: Path, prompt_length: int) -> None:
    path = save_tiny("bart", tmp_path)
    scheduler = MiniScheduler(make_runner(path))
    request = scheduler.add([2, 9][:prompt_length], encoder=tuple(random_ids(12)))
    scheduler.run()
    assert request.output == generate(load_oracle(path), request)
    assert (request.output[0] == 1) == (prompt_length == 1)
    assert request.output[-1] == 2


def test_bart_with_ignore_eos_does_not_force_eos(tmp_path: Path) -> None:
    scheduler = MiniScheduler(make_runner(save_tiny("bart", tmp_path)))
    request = scheduler.add([2], replace(GREEDY, ignore_eos=True), encoder=tuple(random_ids(12)))
    scheduler.run()
    assert len(request.output) == 12
    assert request.output[-1] != 2


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": _LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": None}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
        ("bart", {"scale_embedding": False, "activation_function": "relu", "tie_word_embeddings": False}),
        ("t5", {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 32}),
        ("t5", {"relative_attention_max_distance": 9, "layer_norm_epsilon": 1e-3}),
    ],
)
def test_settings_of_a_family_are_honoured(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, seed=1, **overrides)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
    requests = add_random_requests(scheduler, 3)
    scheduler.run()
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_rope_in_its_older_spelling_means_the_same(tmp_path: Path) -> None:
    outputs = []
    for older in (False, True):
        path = save_tiny("llama", tmp_path / str(older), rope_parameters=_LLAMA3)
        if older:
            config = json.loads((path / "config.json").read_text())
            scaling = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_theta"}
            config |= {"rope_theta": _LLAMA3["rope_theta"], "rope_scaling": scaling}
            (path / "config.json").write_text(json.dumps(config))
        scheduler = MiniScheduler(make_runner(path))
        request = scheduler.add(random_ids(60))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    """Keys whose value is the default of the transformers class are dropped from config.json; nothing may change."""
    path = save_tiny(family, tmp_path)
    before = make_runner(path, max_model_len=64)
    config = json.loads((path / "config.json").read_text())
    kind = type(load_oracle(path).config)
    defaults = kind().to_dict()
    kept = {key: value for key, value in config.items() if key == "architectures" or defaults.get(key) != value}
    assert len(kept) < len(config)
    (path / "config.json").write_text(json.dumps(kept))
    after = make_runner(path, max_model_len=64)
    outputs = []
    for runner in (before, after):
        scheduler = MiniScheduler(runner)
        requests = add_random_requests(scheduler, 2)
        scheduler.run()
        outputs.append([request.output for request in requests])
    assert before.model_info == after.model_info
    assert outputs[0] == outputs[1]
