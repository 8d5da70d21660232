"""Soft prompts of tiny checkpoints, made with PEFT, and what PEFT generates with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from adapters import peft_warnings
from tiny import load_oracle

KINDS: dict[str, Any] = {
    "prompt": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
    "multitask": MultitaskPromptTuningConfig,
}


@peft_warnings()
def save_soft_prompt(
    checkpoint: Path, path: Path, kind: str = "prompt", *, num_tokens: int = 5, seed: int = 0, **settings: Any
) -> Path:
    """Write a soft prompt for `checkpoint` to the directory `path`, strong enough to change what is generated."""
    torch.manual_seed(seed)
    model = load_oracle(checkpoint)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    if kind == "p_tuning":
        settings = {"encoder_hidden_size": 12, **settings}
    peft_model = get_peft_model(model, KINDS[kind](task_type=task, num_virtual_tokens=num_tokens, **settings))
    scale = model.get_input_embeddings().weight.std()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn_like(parameter) * (scale if kind == "prompt" else 1.0))
    peft_model.save_pretrained(str(path))
    return path


@peft_warnings()
def load_soft_prompt(checkpoint: Path, adapter: Path | None) -> Any:
    """The checkpoint with the soft prompt as PEFT loads it, without one as transformers does."""
    model = load_oracle(checkpoint)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@peft_warnings()
def peft_logits(model: Any, prompt: list[int], encoder: list[int] | None = None, **extra: Any) -> Tensor:
    """[num_tokens, vocab_size] of the (decoder) prompt's own tokens."""
    ids = torch.tensor([prompt])
    inputs = {"input_ids": ids} if not encoder else {"input_ids": torch.tensor([encoder]), "decoder_input_ids": ids}
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING":
        extra["task_ids"] = torch.tensor([0])
    with torch.no_grad():
        logits: Tensor = model(**inputs, **extra).logits[0]
    return logits[-len(prompt) :]


def peft_greedy(model: Any, prompt: list[int], encoder: list[int] | None, num_tokens: int, eos: int = 2) -> list[int]:
    """The most likely tokens one by one, each from a forward pass of PEFT over the whole sequence."""
    output: list[int] = []
    while len(output) < num_tokens and eos not in output:
        output.append(int(peft_logits(model, [*prompt, *output], encoder)[-1].argmax()))
    return output
