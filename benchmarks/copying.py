"""A Marian model whose output is its source: random weights, but for those that would disturb the copy.

A benchmark of translation needs sentences that end by themselves, at different lengths that all engines agree on; the
speed of a dense model does not depend on the values of its weights. How it copies:

    what                    how
    token and position      tokens live in the dimensions where positions hardly change, and are zero elsewhere
    every other sublayer    adds nothing: its output projection is zero
    last cross-attention    finds the source token of its own position by the fastest sinusoids, and adds that token,
                            large enough to outweigh the token before, which the decoder has read
    output layer            is tied to the embeddings, so the added token wins; at the end of the source that is EOS
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_TOKEN_SCALE = 2.0  # of a token's components, next to sinusoids of at most 1
_SHARPNESS = 6.0  # of queries and keys: neighbouring positions then score 10 less and more
_GAIN = 8.0  # of the token that is added
_NUM_HEADS = 4


@torch.no_grad()
def teach_copying(model: Any) -> None:
    """Change the weights of a MarianMTModel, just made, in place."""
    config, encoder, decoder = model.config, model.model.encoder, model.model.decoder
    for layer in (*encoder.layers, *decoder.layers):
        layer.self_attn.out_proj.weight.zero_()
        layer.fc2.weight.zero_()
    for layer in decoder.layers:
        layer.encoder_attn.out_proj.weight.zero_()
    token_dims = _token_dims(config.d_model)
    _set_embeddings(model.model.shared.weight, token_dims, config.pad_token_id)
    _set_attention(decoder.layers[-1].encoder_attn, token_dims, config.d_model // config.decoder_attention_heads)


def _token_dims(width: int) -> list[int]:
    """The slow half of the sines, but for the last, which `_set_attention` needs, and that of the cosines."""
    half = width // 2
    return [*range(half // 2, half - 1), *range(half + half // 2, width)]


def _set_embeddings(weight: Tensor, token_dims: list[int], pad: int) -> None:
    """The model multiplies them by the root of its width."""
    rows = torch.randn(len(weight), len(token_dims))
    weight.zero_()
    weight[:, token_dims] = _TOKEN_SCALE / math.sqrt(weight.shape[1]) * (rows - rows.mean(dim=1, keepdim=True))
    weight[pad].zero_()


def _set_attention(attention: Any, token_dims: list[int], head_dim: int) -> None:
    """Each head compares the same fast sinusoids and carries its own share of the token.

    Layer norms subtract a mean that differs between positions; the slowest sine, which is always zero, shows it.
    """
    query, key, value, output = (getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    for weight in (query, key, value):
        weight.zero_()
    half = len(query) // 2
    for head in range(_NUM_HEADS):
        rows = range(head * head_dim, (head + 1) * head_dim)
        fast = [*range(head_dim // 2), *range(half, half + head_dim // 2)]  # sines, then their cosines
        for row, dim in zip(rows, fast, strict=True):
            for weight in (query, key):
                weight[row, dim], weight[row, half - 1] = _SHARPNESS, -_SHARPNESS
        for row, dim in zip(rows, token_dims[rows.start : rows.stop], strict=False):
            value[row, dim], output[dim, row] = 1.0, _GAIN
