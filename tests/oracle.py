"""What transformers says: the prompts of the parity tests and `generate`'s answer to them."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny import load_oracle

PROMPTS = [[5 + (7 * i + j) % 200 for j in range(1 + (5 * i) % 23)] for i in range(16)]


def oracle(path: Path, prompt: list[int], max_tokens: int = 20, decoder: list[int] | None = None) -> list[int]:
    """What transformers' `generate` appends to the (decoder) prompt, greedily."""
    model = load_oracle(path)
    inputs: dict[str, object] = {
        "input_ids": torch.tensor([prompt]),
        "attention_mask": torch.ones(1, len(prompt)).long(),
    }
    if decoder is not None:
        inputs["decoder_input_ids"] = torch.tensor([decoder])
    start = len(decoder) if decoder is not None else 1 if model.config.is_encoder_decoder else len(prompt)
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_tokens)
    return [int(token) for token in output[0, start:]]
