"""Reading a LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors.

What would change more than the products of linear layers is refused by name: an adapter that is applied in part gives
wrong answers without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HUB_PATTERNS = (CONFIG_FILE, WEIGHTS_FILE)

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that change more than the products of linear layers -> what they are called in an error.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "lora_bias",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "target_parameters": "target_parameters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin training that also change the base model's weights


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A [rank, in_features] and B [out_features, rank] in float32; B is scaled."""

    shrink: Tensor
    expand: Tensor

    @property
    def rank(self) -> int:
        return len(self.shrink)


def read_adapter(directory: Path, max_rank: int) -> dict[str, LoraModule]:
    """Module name (as the base model calls it) -> its matrices. Raises ConfigurationError of one line."""
    config = read_config(directory)
    _check_supported(config)
    sides: dict[str, dict[str, Tensor]] = {}  # module -> "A" or "B" -> matrix
    for key, tensor in read_tensors(directory).items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None or tensor.dim() != 2:
            raise ConfigurationError(
                f"{directory.name}: tensor {key} is not LoRA of a linear layer, nothing else works"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    return {module: _make_module(config, module, matrices, max_rank) for module, matrices in sides.items()}


def _make_module(config: JsonConfig, name: str, sides: Mapping[str, Tensor], max_rank: int) -> LoraModule:
    if len(sides) != 2 or sides["A"].shape[0] != sides["B"].shape[1]:
        raise ConfigurationError(f"{config.file}: {name} does not have two matrices of one rank")
    rank = len(sides["A"])
    if rank > max_rank:
        raise ConfigurationError(f"{config.file}: {name} has rank {rank}, more than max_lora_rank {max_rank}")
    alpha = config.number("lora_alpha", 8)
    for pattern, value in config.mapping("alpha_pattern").items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = JsonConfig({"alpha_pattern": value}, config.file).number("alpha_pattern")
            break
    scaling = alpha / (math.sqrt(rank) if config.boolean("use_rslora", False) else rank)
    return LoraModule(sides["A"].contiguous(), (sides["B"] * scaling).contiguous())


def _check_supported(config: JsonConfig) -> None:
    kind = config.string("peft_type")
    if kind != "LORA":
        raise ConfigurationError(
            f"{config.file}: peft_type {kind!r:.40} is not supported, only LORA (soft prompts are prompt adapters)"
        )
    for key, name in _REFUSED.items():
        if config.values.get(key):
            raise ConfigurationError(f"{config.file}: {name} is not supported")
    if config.string("bias", "none") != "none":
        raise ConfigurationError(f"{config.file}: bias {config.values['bias']!r:.40} is not supported, only 'none'")
    start = config.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigurationError(
            f"{config.file}: {start!r:.40} changes the base model's weights: save it as plain LoRA"
        )


def read_config(directory: Path) -> JsonConfig:
    """Raises ConfigurationError."""
    return JsonConfig(read_json(directory / CONFIG_FILE).values, file=f"{directory.name}/{CONFIG_FILE}")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """By name, as they are stored; all are floats. Raises ConfigurationError."""
    path = directory / WEIGHTS_FILE
    if not path.exists():
        raise ConfigurationError(f"{directory.name} has no {WEIGHTS_FILE}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(
            f"{directory.name}/{WEIGHTS_FILE} is not a complete safetensors file: {error}"
        ) from None
    if not tensors or any(not torch.is_floating_point(tensor) for tensor in tensors.values()):
        raise ConfigurationError(f"{directory.name}/{WEIGHTS_FILE} does not hold matrices of floats")
    return tensors
