"""Packed checkpoints against transformers with the weights that they stand for: logits within 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import packers
from packers import quantize_checkpoint
from quantized_checkpoints import AWQ, FORMATS, FP8, GPTQ, compressed, is_linear, quantized
from tiny import BART_LIKE, DECODER_ONLY, T5_LIKE, load_oracle, save_tiny
from trivium.errors import ConfigurationError
from unit.executor.mini_scheduler import GREEDY, MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner, random_ids, record_logits


def assert_same_logits(path: Path, meant: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-4) -> None:
    oracle, scheduler, recorded = load_oracle(meant), MiniScheduler(make_runner(path)), record_logits(monkeypatch)
    prompt, encoder = random_ids(11), random_ids(17, seed=1) if oracle.config.is_encoder_decoder else []
    request = scheduler.add(prompt, GREEDY, encoder=tuple(encoder))
    scheduler.run()
    sequence = torch.tensor([prompt + request.output[:-1]])
    inputs = (
        {"input_ids": torch.tensor([encoder]), "decoder_input_ids": sequence} if encoder else {"input_ids": sequence}
    )
    with torch.no_grad():
        expected = oracle(**inputs).logits[0, len(prompt) - 1 :]
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    torch.testing.assert_close(torch.cat(recorded), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_every_format_means_what_it_says(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, meant = quantized(family, form, tmp_path)
    assert_same_logits(path, meant, monkeypatch)


@pytest.mark.parametrize("form", ["gptq-ordered", "awq-32", "fp8-block"])
@pytest.mark.parametrize("family", [*DECODER_ONLY, *BART_LIKE, *T5_LIKE])
def test_every_family_runs_quantized(family: str, form: str, tmp_path: Path) -> None:
    path, meant = quantized(family, form, tmp_path)
    oracle, scheduler = load_oracle(meant), MiniScheduler(make_runner(path))
    requests = add_random_requests(scheduler, 3)
    scheduler.run()
    assert [request.output for request in requests] == [generate(oracle, request) for request in requests]


def test_blocks_of_128_that_the_weight_does_not_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, pack = {**FP8, "weight_block_size": [128, 128]}, packers.fp8(scales="block", name="weight_scale_inv")
    meant = save_tiny("llama", tmp_path / "meant", hidden_size=144, intermediate_size=200, initializer_range=0.15)
    assert_same_logits(quantize_checkpoint(meant, tmp_path / "q", config, pack, is_linear), meant, monkeypatch)


@pytest.mark.parametrize("form", ["gptq-32", "awq-32", "ct-int4-32"])
def test_an_odd_number_of_groups_of_which_the_last_is_short(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, meant = quantized("llama", form, tmp_path, hidden_size=72, intermediate_size=88)
    stored = load_file(path / "model.safetensors")
    scales = next(tensor for name, tensor in stored.items() if "q_proj" in name and "scale" in name)
    assert 3 in scales.shape
    assert_same_logits(path, meant, monkeypatch)


def test_an_output_layer_may_be_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meant = quantized("llama", "gptq-32", tmp_path, lambda layer: is_linear(layer) or layer == "lm_head")
    assert "lm_head.qweight" in load_file(path / "model.safetensors")
    assert_same_logits(path, meant, monkeypatch)


def test_a_tied_model_keeps_its_embedding_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meant = quantized("qwen2", "awq-32", tmp_path)
    assert not any(name.startswith("lm_head") for name in load_file(path / "model.safetensors"))
    assert_same_logits(path, meant, monkeypatch)


@pytest.mark.parametrize("form", ["awq-32", "fp8-tensor", "ct-int4-32"])
def test_layers_that_are_not_converted_merge_with_those_that_are(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    path, meant = quantized("llama", form, tmp_path, lambda layer: is_linear(layer) and layer not in skipped)
    edit(path, modules_to_not_convert=skipped, ignore=skipped)
    assert_same_logits(path, meant, monkeypatch)


def test_gptq_layers_with_settings_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(layer: str) -> bool:
        return layer.endswith("down_proj")

    config = {
        **GPTQ,
        "group_size": 32,
        "dynamic": {r"+:.*down_proj$": {"bits": 8, "group_size": 64}, r"-:.*o_proj$": {}},
    }
    meant = save_tiny("llama", tmp_path / "meant")
    part = quantize_checkpoint(meant, tmp_path / "part", config, packers.gptq(bits=8, group_size=64), down)
    eight = {name: tensor for name, tensor in load_file(part / "model.safetensors").items() if "down_proj" in name}
    path = quantize_checkpoint(
        meant,
        tmp_path / "quantized",
        config,
        packers.gptq(),
        lambda layer: is_linear(layer) and not down(layer) and not layer.endswith("o_proj"),
    )
    stored = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if "down_proj" not in name}
    save_file(stored | eight, path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(path, meant, monkeypatch)


def test_groups_of_layers_with_formats_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compressed("mixed-precision", num_bits=4, strategy="group", group_size=32)
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    config["config_groups"]["group_1"] = {"targets": ["re:.*self_attn.*"], "weights": eight, "format": "int-quantized"}
    meant = save_tiny("llama", tmp_path / "meant")
    half = quantize_checkpoint(meant, tmp_path / "half", config, packers.int8(), lambda layer: "self_attn" in layer)
    attention = {n: tensor for n, tensor in load_file(half / "model.safetensors").items() if "self_attn" in n}
    path = quantize_checkpoint(meant, tmp_path / "q", config, packers.packed_integers(), lambda n: ".mlp." in n)
    stored = {n: tensor for n, tensor in load_file(path / "model.safetensors").items() if "self_attn" not in n}
    save_file(stored | attention, path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(path, meant, monkeypatch)


def test_packed_weights_may_be_in_files_of_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meant = quantized("llama", "gptq-ordered", tmp_path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert_same_logits(path, meant, monkeypatch)


@pytest.mark.parametrize(("file", "form"), [("quantize_config.json", "gptq-32"), ("quant_config.json", "awq-32")])
def test_older_tools_wrote_a_file_of_their_own(
    file: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, meant = quantized("llama", form, tmp_path)
    settings = json.loads((path / "config.json").read_text())
    own = settings.pop("quantization_config")
    own.pop("quant_method")
    (path / "config.json").write_text(json.dumps(settings))
    (path / file).write_text(json.dumps(own))
    assert_same_logits(path, meant, monkeypatch)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not supported: awq, gptq, fp8"),
        ({"load_in_8bit": True}, "'bitsandbytes' is not supported: awq, gptq, fp8"),
        ({"quant_method": "exl2"}, "'exl2' is not supported: awq, gptq"),
        ({"quant_method": "gguf"}, "'gguf' is not supported: awq, gptq"),
        ({**GPTQ, "bits": 3}, "GPTQ with 3 bits is not supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' of GPTQ is not supported: gptq, gptq_v2"),
        ({**GPTQ, "group_size": 0}, "group_size must be -1 or positive, got 0"),
        ({**AWQ, "bits": 8}, "AWQ with 8 bits is not supported, only with 4"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' of AWQ is not supported, only 'gemm'"),
        ({**FP8, "activation_scheme": "odd"}, "activation_scheme 'odd' of FP8 is not supported"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size must be two sizes"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "format 'nvfp4-pack-quantized' of compressed"),
        (compressed("pack-quantized", num_bits=3, strategy="channel"), r"3 bits \(int\) in group_0 are not supported"),
        ({**compressed("dense", num_bits=4), "sparsity_config": {"format": "sparse-24"}}, "sparse compressed-tensors"),
        ({"bits": 4}, "quant_method is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    edit(path, quantization_config=config)
    with pytest.raises(ConfigurationError, match=message):
        make_runner(path)


@pytest.mark.parametrize(
    ("form", "end", "change", "message"),
    [
        ("gptq-32", "qzeros", None, "has no tensor model.layers.0.self_attn.q_proj.qzeros"),
        ("gptq-32", "g_idx", lambda t: t + 7, "q_proj: its 48 inputs do not fit 2 groups"),
        ("gptq-32", "qweight", lambda t: t[:-1], "q_proj: 40 packed inputs of 4 bits, but config.json asks for 48"),
        ("gptq-32", "scales", lambda t: t[:, :-1], "do not fit 48 outputs"),
        ("awq-32", "qweight", lambda t: t[:-1], "q_proj: 47 packed inputs, but config.json asks for 48"),
        ("fp8-block", "weight_scale_inv", lambda t: t[:, :-1], r"scales \[3, 1\] do not fit a weight \[48, 48\]"),
        ("fp8-channel", "weight", lambda t: t[:, :-1], r"packed weight of .*q_proj has shape \[48, 47\]"),
        ("ct-int4-32", "weight_packed", lambda t: t[:, :-1], "q_proj: 40 packed inputs of 4 bits"),
    ],
)
def test_packed_tensors_that_do_not_fit_are_refused_by_name(
    form: str, end: str, change: Any, message: str, tmp_path: Path
) -> None:
    path, _ = quantized("llama", form, tmp_path)
    stored = load_file(path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{end}"
    tensor = stored.pop(name)
    if change is not None:
        stored[name] = change(tensor).contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=message):
        make_runner(path)


@pytest.mark.parametrize("name", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_a_format_that_is_named_must_be_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    path, meant = quantized("llama", "awq-32", tmp_path)
    if name == "awq":
        make_runner(path, quantization=name)
    else:
        with pytest.raises(ConfigurationError, match=f"quantization is '{name}', but the .* are awq: leave it out"):
            make_runner(path, quantization=name)
    with pytest.raises(ConfigurationError, match=f"quantization is '{name}', but the .* are floats: .* in int8"):
        make_runner(meant, quantization=name)


def edit(path: Path, **changes: object) -> None:
    settings = json.loads((path / "config.json").read_text())
    for name in ("modules_to_not_convert", "ignore"):
        if name in changes:
            settings["quantization_config"][name] = changes.pop(name)
    (path / "config.json").write_text(json.dumps({**settings, **changes}))


def test_gptq_of_the_first_version_wraps_a_zero_point_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pack = FORMATS["gptq-128-asym"]
    meant = save_tiny("llama", tmp_path / "meant")
    tensors = load_file(meant / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][:8].abs_()  # outputs whose smallest weight is the zero point
    save_file(tensors, meant / "model.safetensors", metadata={"format": "pt"})
    path = quantize_checkpoint(meant, tmp_path / "quantized", config, pack, is_linear)
    stored = load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
    assert stored[0, 0] == -1  # eight times 15
    assert_same_logits(path, meant, monkeypatch)
