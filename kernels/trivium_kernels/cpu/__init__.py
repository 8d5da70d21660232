"""Every op in C++ for the processor at hand (`native/`): the fast path on a CPU, where the extension was built.

Importing this package raises ImportError where it was not; `dispatch` then takes plain torch. Only a recorder
has state.
The module passes addresses: whatever is not float32 in the layout of the contract goes to plain torch instead.
"""

from trivium_kernels.cpu.activation import activate, gated_activate
from trivium_kernels.cpu.attention import (
    paged_attention,
    plan_paged_attention,
    plan_varlen_attention,
    varlen_attention,
)
from trivium_kernels.cpu.norms import layer_norm, rms_norm
from trivium_kernels.cpu.packed_weight import PackedWeight, WeightType, can_pack
from trivium_kernels.cpu.recording import NativeRecorder
from trivium_kernels.cpu.rotate_and_cache import reshape_and_cache, rotary_embedding, rotate_and_cache
from trivium_kernels.cpu.token_bitmask import apply_token_bitmask

__all__ = [
    "NativeRecorder",
    "PackedWeight",
    "WeightType",
    "activate",
    "apply_token_bitmask",
    "can_pack",
    "gated_activate",
    "layer_norm",
    "paged_attention",
    "plan_paged_attention",
    "plan_varlen_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "rotate_and_cache",
    "varlen_attention",
]
