"""LoRA adapters of tiny checkpoints, made with PEFT, and what PEFT generates with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tiny import load_oracle

DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BART_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
T5_TARGETS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_OWN_TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


def targets_of(family: str) -> tuple[str, ...]:
    if "t5" in family:
        return T5_TARGETS
    if family in _OWN_TARGETS:
        return _OWN_TARGETS[family]
    return DECODER_TARGETS if family in ("llama", "mistral", "qwen2", "qwen3") else BART_TARGETS


@contextmanager
def peft_warnings() -> Iterator[None]:
    """PEFT calls what transformers means to remove, and warns of tied and missing layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@peft_warnings()
def save_adapter(checkpoint: Path, path: Path, targets: tuple[str, ...], *, seed: int = 0, **settings: Any) -> Path:
    """Write an adapter for `checkpoint` to the directory `path`, strong enough to change what is generated."""
    torch.manual_seed(seed)
    model = load_oracle(checkpoint)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings})
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    peft_model.save_pretrained(str(path))
    return path


@peft_warnings()
def load_peft(checkpoint: Path, adapter: Path | None) -> Any:
    """The checkpoint with the adapter as PEFT loads it, without one as transformers does."""
    model = load_oracle(checkpoint)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()
