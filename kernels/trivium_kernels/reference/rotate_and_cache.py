"""`rotate_and_cache`, composed of the ops that it stands for."""

from __future__ import annotations

from torch import Tensor

from trivium_kernels.reference.reshape_and_cache import reshape_and_cache
from trivium_kernels.reference.rms_norm import rms_norm
from trivium_kernels.reference.rotary_embedding import rotary_embedding
from trivium_kernels.rotate_and_cache import HeadNorms


def rotate_and_cache(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    num_kv_heads = key_cache.shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = qkv.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms.query, norms.eps), rms_norm(key, norms.key, norms.eps)
    query, key = rotary_embedding(query, *rotation), rotary_embedding(key, *rotation)
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
    return query
