"""Loading a checkpoint: every way it can be wrong is one clear line, and every way it can be right loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny, tiny_model
from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.loader import find_checkpoint
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
        (lambda path: edit_config(path, rope_parameters={"rope_type": "axial"}), "rope type 'axial' is not supported"),
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
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "is not an index of tensors"),
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


def store_as_bin(path: Path, *, rename: Callable[[str], str] = str, num_files: int = 1) -> None:
    """As torch.save writes it, in one file or several with an index."""
    tensors = {rename(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{index % num_files}.bin" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("options", [{}, {"num_files": 3}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_checkpoint_of_torch_save_loads_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    expected = run(path)
    store_as_bin(path, **options)
    assert run(path) == expected


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "m2m_100"])
def test_encoder_decoder_checkpoints_of_torch_save_load_the_same(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    outputs = []
    for is_bin in (False, True):
        if is_bin:
            store_as_bin(path, num_files=2)
        scheduler = MiniScheduler(make_runner(path, max_model_len=32, kv_cache_memory_bytes=2**23))
        request = scheduler.add([2], encoder=(5, 6, 7))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    (path / "pytorch_model.bin").write_bytes(b"never read")
    assert len(run(path)) > 1


class _Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_holds_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    path, target = save_tiny("llama", tmp_path / "model"), tmp_path / "ran"
    (path / "model.safetensors").unlink()
    torch.save({"x": _Exploit(target)}, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ConfigurationError, match=r"pytorch_model\.bin is not a file of tensors that can be read safely"
    ):
        make_runner(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of tensors"),
        (b"PK\x03\x04 and no more", "is not a file of tensors"),
        ([torch.zeros(2)], "holds something else than a dict of tensors"),
        (
            {"model.embed_tokens.weight": torch.zeros(260, 48, dtype=torch.int8)},
            "embed_tokens.weight is stored as int8",
        ),
        ({"model.embed_tokens.weight": 3}, "is not a file of tensors that can be read safely"),
    ],
)
def test_a_broken_checkpoint_of_torch_save_is_one_clear_line(content: object, message: str, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    (path / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_runner(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model."),
        ("gpt2", "transformer."),
        ("opt", "model."),
        ("falcon", "transformer."),
        ("gpt_neox", "gpt_neox."),
    ],
)
def test_tensors_may_be_stored_without_the_prefix_of_their_base_model(family: str, prefix: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    expected = run(path)
    store_as_bin(path, rename=lambda name: name.removeprefix(prefix))
    assert run(path) == expected


def test_the_output_of_gpt_neox_has_two_names(tmp_path: Path) -> None:
    path = save_tiny("gpt_neox", tmp_path)
    expected = run(path)
    store_as_bin(path, rename=lambda name: name.replace("lm_head", "embed_out"))
    assert run(path) == expected


def test_a_bart_that_calls_itself_a_bare_model_is_served_as_the_whole(tmp_path: Path) -> None:
    path = save_tiny("bart", tmp_path)
    outputs = []
    for bare in (False, True):
        if bare:
            edit_weights(path, lambda tensors: tensors.pop("final_logits_bias"))
            store_as_bin(path, rename=lambda name: name.removeprefix("model."))
            edit_config(path, architectures=["BartModel"])
        else:
            edit_weights(path, lambda tensors: tensors.update(final_logits_bias=torch.zeros(1, 260)))
        scheduler = MiniScheduler(make_runner(path, kv_cache_memory_bytes=2**23))
        request = scheduler.add([2], encoder=(5, 6, 7))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_bin_files_of_a_hub_model_are_fetched_only_without_safetensors(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(source: str, *, allow_patterns: list[str], **kwargs: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    if has_safetensors:
        (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_checkpoint(ExecutorConfig(model="org/name", served_model_name="name")) == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == ([False] if has_safetensors else [False, True])


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
    with pytest.raises(ConfigurationError, match="torch finds no GPU here"):
        make_runner(path, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert make_runner(path, dtype="float16").model_info.dtype == "float32"
    assert "dtype adjusted from float16 to float32" in caplog.text


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
