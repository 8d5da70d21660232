"""Loading a checkpoint: every way it can be wrong is one clear line, and every way it can be right loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny, tiny_model
from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.model_runner import ModelRunner
from unit.executor.mini_scheduler import MiniScheduler


def make_runner(path: Path | str, **settings: object) -> ModelRunner:
    torch.set_num_threads(1)
    fields = {"max_num_seqs": 2, "kv_cache_memory_bytes": 2**21, "block_size": 4, **settings}
    return ModelRunner(ExecutorConfig(model=str(path), served_model_name="tiny", **fields))  # type: ignore[arg-type]


def run(path: Path) -> list[int]:
    scheduler = MiniScheduler(make_runner(path))
    request = scheduler.add([5, 6, 7])
    scheduler.run()
    return request.output


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard(path: Path) -> None:
    """Two files and an index, as large checkpoints are stored."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()


_NORM, _OUTPUT = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("break_checkpoint", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json: it is not a model directory"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json must hold a JSON object"),
        (lambda path: edit_config(path, architectures=None), "config.json: architectures is missing"),
        (lambda path: edit_config(path, architectures=["X"]), "architecture 'X' is not supported: LlamaForCausalLM, "),
        (lambda path: edit_config(path, hidden_size="48"), "hidden_size must be an integer, got '48'"),
        (lambda path: edit_config(path, hidden_act="prelu"), "hidden_act 'prelu' is not supported"),
        (lambda path: edit_config(path, rope_parameters={"rope_type": "yarn"}), "rope type 'yarn' is not supported"),
        (lambda path: (path / "generation_config.json").write_text("?"), "generation_config.json is not valid JSON"),
        (lambda path: (path / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (truncate, "model.safetensors is not a complete safetensors file"),
        (lambda path: edit_weights(path, lambda t: t.pop(_NORM)), f"has no tensor {_NORM}"),
        (lambda path: edit_config(path, intermediate_size=57), r"has shape \[56, 48\], but config.json asks for"),
        (
            lambda path: edit_weights(path, lambda t: t.update({_OUTPUT: t[_OUTPUT].to(torch.int8)})),
            f"tensor {_OUTPUT} is stored as I8",
        ),
        (lambda path: (shard(path), (path / "model-1.safetensors").unlink()), "has no model-1.safetensors"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "is not a safetensors index"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "weight_map must map tensor names to file names",
        ),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(
    break_checkpoint: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = save_tiny("llama", tmp_path / "model")
    break_checkpoint(path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_directory_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(ConfigurationError, match=f"model directory {source} does not exist"):
        make_runner(source)


def test_a_sharded_checkpoint_loads_the_same(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    expected = run(path)
    shard(path)
    assert run(path) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    edit_weights(path, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    rounded = run(path)
    edit_weights(path, lambda t: t.update({name: tensor.float() for name, tensor in t.items()}))
    assert rounded == run(path)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_shared_embedding_may_be_stored_under_another_of_its_names(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    prefix = "model." if family == "bart" else ""
    before = make_runner(path, max_model_len=32, kv_cache_memory_bytes=2**23)
    edit_weights(path, lambda t: t.update({f"{prefix}encoder.embed_tokens.weight": t.pop(f"{prefix}shared.weight")}))
    after = make_runner(path, max_model_len=32, kv_cache_memory_bytes=2**23)
    outputs = []
    for runner in (before, after):
        scheduler = MiniScheduler(runner)
        request = scheduler.add([2], encoder=(5, 6, 7))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


def test_the_model_needs_a_readable_dtype_and_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_tiny("llama", tmp_path)
    with pytest.raises(ConfigurationError, match="dtype 'int8' is not supported"):
        make_runner(path, dtype="int8")
    with pytest.raises(ConfigurationError, match="device 'cuda' is not supported"):
        make_runner(path, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert make_runner(path, dtype="bfloat16").model_info.dtype == "float32"
    assert "dtype adjusted from bfloat16 to float32" in caplog.text


def test_special_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    path = save_tiny("bart", tmp_path)
    generation = {"eos_token_id": [5, 6], "forced_bos_token_id": 8, "decoder_start_token_id": 9}
    (path / "generation_config.json").write_text(json.dumps(generation))
    info = make_runner(path).model_info
    assert info.eos_token_ids == (5, 6)
    assert (info.decoder_start_token_id, info.forced_bos_token_id) == (9, 8)
    assert info.forced_eos_token_id is None  # config.json has one, but generation_config.json decides
    assert (info.bos_token_id, info.pad_token_id) == (1, 0)
    (path / "generation_config.json").unlink()
    info = make_runner(path).model_info
    assert (info.eos_token_ids, info.forced_eos_token_id) == ((2,), 2)


def test_start_up_is_told_in_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_tiny("llama", tmp_path)
    with caplog.at_level(logging.INFO, "trivium"):
        make_runner(path, max_model_len=500)
    assert len(caplog.records) <= 6
    assert "LlamaForCausalLM, float32" in caplog.text
    assert "max_model_len adjusted from 500 to the model's 128" in caplog.text
    assert "KV cache:" in caplog.text


def test_tiny_models_are_reproducible() -> None:
    first, second = (tiny_model("llama", seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
