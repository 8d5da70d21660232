"""Hidden states of whole prompts: one pass beside the standing batch, with a KV pool of its own for that pass.

Nothing stays: neither rows nor keys and values. Of an encoder-decoder model they are the encoder's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.attention import AttentionMetadata, PagedRows
from trivium.executor.kv_cache import KVCache
from trivium.executor.models.model import LanguageModel
from trivium.pooling import PoolingType


@torch.inference_mode()
def embed(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    kind: PoolingType,
    *,
    normalize: bool,
    block_size: int,
    max_model_len: int,
    device: torch.device,
) -> list[Tensor]:
    """One vector [hidden] for each prompt, with ALL one for each of its tokens [num_tokens, hidden]. float32,
    on the host.

    The prompts, of at least one token each, are packed into one pass.
    """
    lens = np.array([len(prompt) for prompt in prompts])
    token_ids, positions = transfers.upload_all(
        (
            np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts]),
            np.concatenate([np.arange(length) for length in lens]),
        ),
        device,
    )
    bounds = torch.from_numpy(np.concatenate(([0], np.cumsum(lens))))
    if model.encoder is not None:
        hidden = model.encoder.hidden_states(token_ids, positions, bounds)
    else:
        hidden = _run_decoder(model, token_ids, positions, lens, bounds, block_size, max_model_len)
    parts = torch.split(hidden.float(), lens.tolist())
    return [_pool(part, kind, normalize=normalize).cpu() for part in parts]


def _run_decoder(
    model: LanguageModel,
    token_ids: Tensor,
    positions: Tensor,
    lens: np.typing.NDArray[np.int64],
    bounds: Tensor,
    block_size: int,
    max_model_len: int,
) -> Tensor:
    num_blocks = -(-lens // block_size)
    first_blocks = np.concatenate(([0], np.cumsum(num_blocks)[:-1]))
    tables = first_blocks[:, None] + np.minimum(np.arange(num_blocks.max())[None, :], num_blocks[:, None] - 1)
    slots = np.concatenate(
        [first * block_size + np.arange(length) for first, length in zip(first_blocks, lens, strict=True)]
    )
    slot_mapping, block_tables, context_lens = transfers.upload_all(
        (slots, tables.astype(np.int32), lens), token_ids.device
    )
    metadata = AttentionMetadata(
        cu_seqlens_q=bounds,
        slot_mapping=slot_mapping,
        self_rows=PagedRows(block_tables, context_lens),
        cross_rows=None,
        max_model_len=max_model_len,
    )
    cache = KVCache(model.kv_shape, int(num_blocks.sum()), block_size, device=token_ids.device)
    return model.decoder.forward(token_ids, positions, cache, metadata)


def _pool(hidden: Tensor, kind: PoolingType, *, normalize: bool) -> Tensor:
    """hidden: [num_tokens, hidden] of one prompt."""
    match kind:
        case PoolingType.LAST:
            pooled = hidden[-1]
        case PoolingType.CLS:
            pooled = hidden[0]
        case PoolingType.MEAN:
            pooled = hidden.mean(0)
        case PoolingType.ALL:
            pooled = hidden
    return (F.normalize(pooled, dim=-1) if normalize else pooled).clone()
