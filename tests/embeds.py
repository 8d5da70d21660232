"""Embeddings for tests: what a checkpoint's own table gives for token ids, and other rows that no token has."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import load_oracle
from trivium.embeds import PromptEmbeds
from trivium.prompt_embeds import to_prompt_embeds


def embed(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[len(ids), hidden] what `model` makes of `ids`, as its `inputs_embeds` takes it."""
    scale = getattr(model.get_encoder(), "embed_scale", 1.0) if model.config.is_encoder_decoder else 1.0
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(ids)) * scale


def soft_rows(model: PreTrainedModel, ids: list[int], seed: int = 0) -> Tensor:
    """As `embed`, moved away from every token."""
    rows = embed(model, ids)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return rows + 0.3 * rows.std() * noise


def packed(rows: Tensor) -> PromptEmbeds:
    return to_prompt_embeds(rows)


def saved(rows: object) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return buffer.getvalue()


def generate_from(path: Path, rows: Tensor, decoder: list[int] | None = None, **settings: object) -> list[int]:
    """What transformers' `generate` makes of embeddings, greedily unless `settings` say otherwise."""
    model = load_oracle(path)
    inputs: dict[str, object] = {
        "inputs_embeds": rows[None],
        "attention_mask": torch.ones(1, len(rows)).long(),
        "do_sample": False,
        "num_beams": 1,
        **settings,
    }
    if decoder is not None:
        inputs["decoder_input_ids"] = torch.tensor([decoder])
    start = len(decoder) if decoder is not None else int(model.config.is_encoder_decoder)
    with torch.inference_mode():
        return [int(token) for token in model.generate(**inputs)[0, start:]]


def encoded(rows: object) -> str:
    """Base64 of what `torch.save` writes."""
    return base64.b64encode(saved(rows)).decode()


def raw(rows: Tensor) -> dict[str, object]:
    """As bytes with shape and type."""
    data = rows.contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "data": base64.b64encode(data).decode(),
        "shape": list(rows.shape),
        "dtype": str(rows.dtype).removeprefix("torch."),
    }
