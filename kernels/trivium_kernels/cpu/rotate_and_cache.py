"""`rotary_embedding`, `reshape_and_cache`, and both in one pass, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels import reference
from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import bits, heads_of
from trivium_kernels.cpu.memory import empty
from trivium_kernels.rotate_and_cache import HeadNorms


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype is not torch.float32:
        return reference.rotary_embedding(x, cos, sin)
    x = heads_of(x)
    num_tokens, num_heads, head_dim = x.shape
    y = empty(x.shape)
    _native.rotate(
        x.data_ptr(),
        cos.contiguous().data_ptr(),
        sin.contiguous().data_ptr(),
        y.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
        cos.shape[-1],
        x.stride(0),
    )
    return y


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    if key.dtype is not torch.float32:
        reference.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
        return
    key, value, slot_mapping = heads_of(key), heads_of(value), slot_mapping.contiguous()
    _native.write_cache(
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        key.shape[0],
        key.shape[1] * key.shape[2],
        key.stride(0),
        value.stride(0),
        key_cache.shape[1],
        key_cache.stride(0),
    )


def rotate_and_cache(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    if qkv.dtype is not torch.float32:
        return reference.rotate_and_cache(qkv, rotation, key_cache, value_cache, slot_mapping, norms)
    qkv = heads_of(qkv)
    cos, sin = rotation[0].contiguous(), rotation[1].contiguous()
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = key_cache.shape[2]
    num_heads = num_all_heads - 2 * num_kv_heads
    queries = empty((num_tokens, num_heads, head_dim))
    slot_mapping = slot_mapping.contiguous()
    _native.rotate_and_cache(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if norms is None else norms.query.data_ptr(),
        0 if norms is None else norms.key.data_ptr(),
        queries.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        cos.shape[-1],
        qkv.stride(0),
        key_cache.shape[1],
        key_cache.stride(0),
        0 if norms is None else bits(norms.eps),
    )
    return queries
