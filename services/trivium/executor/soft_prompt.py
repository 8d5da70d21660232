"""Reading a soft prompt as PEFT saves it: adapter_config.json and the virtual tokens in adapter_model.safetensors.

| peft_type | what is saved | what comes of it |
|---|---|---|
| PROMPT_TUNING, P_TUNING | embeddings [num_tokens, hidden] | tokens ahead of the prompt, or of the encoder input |
| MULTITASK_PROMPT_TUNING | the same, and two factors of each task | the same, if there is one task |
| PREFIX_TUNING | keys and values of all layers | what the decoder has attended to before its first token |

An adapter of an encoder-decoder model may hold as many tokens again for the decoder, which PEFT does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.model import LanguageModel
from trivium.executor.parallel.shard import Shard, as_slice
from trivium.executor.peft import read_config, read_tensors
from trivium.executor.slot_embeds import Floats

_EMBEDDED = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_KINDS = (*_EMBEDDED, "PREFIX_TUNING")
_TOKENS = "prompt_embeddings"
_FACTORS = ("prefix_task_cols", "prefix_task_rows")


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Virtual tokens, ahead of the encoder input if `of_encoder`; one of their two forms.

    rows: [num_tokens, hidden] float32. keys_values: [num_layers, 2, num_tokens, num_kv_heads, head_dim] of this rank.
    """

    num_tokens: int
    of_encoder: bool = False
    rows: Floats | None = None
    keys_values: Tensor | None = None

    @property
    def is_prefix(self) -> bool:
        return self.keys_values is not None


def read_soft_prompt(directory: Path, model: LanguageModel, shard: Shard, max_tokens: int) -> SoftPrompt:
    """The soft prompt in `directory`, which is for `model`. Raises ConfigurationError of one line."""
    config = read_config(directory)
    kind = _check_kind(config)
    if config.values.get("modules_to_save"):
        raise ConfigurationError(f"{config.file}: modules_to_save is not supported")
    is_pair = model.encoder is not None
    task, wanted = config.values.get("task_type"), "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM"
    if task != wanted:
        raise ConfigurationError(f"{config.file}: task_type {task!r:.40} is not this model's, which is {wanted}")
    num_tokens = config.positive_integer("num_virtual_tokens")
    if num_tokens > max_tokens:
        raise ConfigurationError(
            f"{config.file}: num_virtual_tokens {num_tokens} is more than max_prompt_adapter_token {max_tokens}"
        )
    tensors = read_tensors(directory)
    if _TOKENS not in tensors or tensors[_TOKENS].dim() != 2:
        raise ConfigurationError(f"{directory.name}: there is no matrix {_TOKENS}")
    if kind == "PREFIX_TUNING":
        return _read_prefix(config, tensors[_TOKENS].float(), num_tokens, model, shard)
    if not model.hidden_size:
        raise ConfigurationError(f"{config.file}: {kind} needs a model that takes embeddings, which this one does not")
    rows = tensors[_TOKENS].float()
    if kind == "MULTITASK_PROMPT_TUNING":
        rows = rows * _task_factors(config, tensors, rows, is_pair=is_pair)
    if len(rows) not in (num_tokens, 2 * num_tokens if is_pair else num_tokens) or rows.shape[1] != model.hidden_size:
        raise ConfigurationError(
            f"{config.file}: the virtual tokens have shape {list(rows.shape)}, "
            f"but {num_tokens} of this model are {[num_tokens, model.hidden_size]}"
        )
    return SoftPrompt(num_tokens, is_pair, rows=rows[:num_tokens].contiguous().numpy())


def _check_kind(config: JsonConfig) -> str:
    kind = config.string("peft_type")
    if kind == "LORA":
        raise ConfigurationError(f"{config.file}: this is a LoRA adapter, not a soft prompt")
    if kind not in _KINDS:
        raise ConfigurationError(f"{config.file}: peft_type {kind!r:.40} is not supported, only {', '.join(_KINDS)}")
    return kind


def _read_prefix(config: JsonConfig, flat: Tensor, num_tokens: int, model: LanguageModel, shard: Shard) -> SoftPrompt:
    """flat: [num_tokens, layers * (keys, values) * heads * head_dim].

    For a pair PEFT lays the layers out twice and gives each layer four of these, as if it would use two of them for
    cross-attention: layer i of n has what are the keys and values of layer 2 * i % n elsewhere.
    """
    shape, num_heads, is_pair = model.kv_shape, model.num_kv_heads, model.encoder is not None
    if is_pair and config.values.get("num_transformer_submodules") != 2:
        raise ConfigurationError(f"{config.file}: num_transformer_submodules of a prefix must be 2 for this model")
    saved = config.positive_integer("num_layers"), config.positive_integer("num_attention_heads")
    wanted = num_tokens, shape.num_layers * 2 * num_heads * shape.head_dim
    if tuple(flat.shape) != wanted or saved != (shape.num_layers, num_heads):
        raise ConfigurationError(
            f"{config.file}: the prefix has shape {list(flat.shape)}, of {saved[0]} layers and {saved[1]} heads, but "
            f"the decoder has {shape.num_layers} layers and {num_heads} key heads of {shape.head_dim}, which "
            f"makes {list(wanted)}"
        )
    tokens = flat.view(num_tokens, shape.num_layers, 2, num_heads, shape.head_dim)
    tokens = tokens[:, :, :, as_slice(shard.kv_heads(num_heads))]
    if is_pair:
        tokens = tokens[:, [2 * layer % shape.num_layers for layer in range(shape.num_layers)]]
    return SoftPrompt(num_tokens, keys_values=tokens.permute(1, 2, 0, 3, 4).contiguous())


def _task_factors(config: JsonConfig, tensors: Mapping[str, Tensor], rows: Tensor, *, is_pair: bool) -> Tensor:
    """What the embeddings of one task are multiplied by: [num_rows, hidden]."""
    if is_pair and config.values.get("num_transformer_submodules") != 1:
        raise ConfigurationError(
            f"{config.file}: MULTITASK_PROMPT_TUNING with tokens of the decoder, too (num_transformer_submodules other "
            "than 1), is not supported"
        )
    columns, ranks = (tensors.get(name, torch.empty(0)).float() for name in _FACTORS)
    if columns.dim() != 3 or ranks.dim() != 3 or len(columns) != len(ranks) or columns.shape[2] != ranks.shape[1]:
        raise ConfigurationError(f"{config.file}: {' and '.join(_FACTORS)} are missing or do not fit")
    if len(columns) != 1:
        raise ConfigurationError(
            f"{config.file}: num_tasks {len(columns)} is not supported, only 1: a request does not say which task it is"
        )
    factors = columns[0] @ ranks[0]
    if factors.shape != rows.shape:
        raise ConfigurationError(f"{config.file}: the task factors have shape {list(factors.shape)}")
    return factors
