"""The ops in Triton, for a GPU: one file per op, with its launcher and its kernels. Imported by `dispatch.py` alone.

Rules that all of them keep. Launchers read nothing back from the device and allocate by shapes alone, so that a CUDA
graph can record them; plans read their bounds, which had better be on the host. What changes from step to step is no
constant of a kernel, or it would be compiled again while requests wait. Offsets into pools are 64 bits wide. Arithmetic
is float32. How a row is computed depends on that row and on the shapes of the model, never on the other rows of a
batch; where that cannot be held, the file says so. The kernels run on the current device.

Tile sizes and numbers of warps follow from what registers and shared memory hold (`benchmarks/gpu.py --compile`); they
have not been measured on a GPU yet.
"""

from trivium_kernels.gpu.activation import activate, gated_activate
from trivium_kernels.gpu.add_stacked_lora import add_stacked_lora
from trivium_kernels.gpu.byte_linear import byte_linear
from trivium_kernels.gpu.copy_blocks import copy_blocks
from trivium_kernels.gpu.gather_logprobs import gather_logprobs
from trivium_kernels.gpu.int4_linear import int4_linear
from trivium_kernels.gpu.layer_norm import add_layer_norm, layer_norm
from trivium_kernels.gpu.logit_bias import add_logit_bias
from trivium_kernels.gpu.move_blocks import move_blocks
from trivium_kernels.gpu.paged_attention import paged_attention, plan_paged_attention
from trivium_kernels.gpu.penalties import apply_penalties, count_tokens
from trivium_kernels.gpu.reshape_and_cache import reshape_and_cache
from trivium_kernels.gpu.rms_norm import add_rms_norm, rms_norm
from trivium_kernels.gpu.rotary_embedding import rotary_embedding
from trivium_kernels.gpu.rotate_and_cache import rotate_and_cache
from trivium_kernels.gpu.sample_tokens import sample_tokens
from trivium_kernels.gpu.select_beams import select_beams
from trivium_kernels.gpu.token_bitmask import apply_token_bitmask
from trivium_kernels.gpu.varlen_attention import plan_varlen_attention, varlen_attention

__all__ = [
    "activate",
    "add_layer_norm",
    "add_logit_bias",
    "add_rms_norm",
    "add_stacked_lora",
    "apply_penalties",
    "apply_token_bitmask",
    "byte_linear",
    "copy_blocks",
    "count_tokens",
    "gated_activate",
    "gather_logprobs",
    "int4_linear",
    "layer_norm",
    "move_blocks",
    "paged_attention",
    "plan_paged_attention",
    "plan_varlen_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "rotate_and_cache",
    "sample_tokens",
    "select_beams",
    "varlen_attention",
]
