"""Every op in plain torch: the CPU path, and the definition that other implementations are tested against.

Contracts are in the op files above. Nothing here keeps state.
"""

from trivium_kernels.reference.activation import activate, gated_activate
from trivium_kernels.reference.add_lora import add_lora
from trivium_kernels.reference.add_stacked_lora import add_stacked_lora
from trivium_kernels.reference.byte_linear import byte_linear
from trivium_kernels.reference.copy_blocks import copy_blocks
from trivium_kernels.reference.gather_logprobs import gather_logprobs
from trivium_kernels.reference.int4_linear import int4_linear
from trivium_kernels.reference.layer_norm import add_layer_norm, layer_norm
from trivium_kernels.reference.logit_bias import add_logit_bias
from trivium_kernels.reference.move_blocks import move_blocks
from trivium_kernels.reference.paged_attention import paged_attention, plan_paged_attention
from trivium_kernels.reference.penalties import apply_penalties, count_tokens
from trivium_kernels.reference.reshape_and_cache import reshape_and_cache
from trivium_kernels.reference.rms_norm import add_rms_norm, rms_norm
from trivium_kernels.reference.rotary_embedding import rotary_embedding
from trivium_kernels.reference.rotate_and_cache import rotate_and_cache
from trivium_kernels.reference.sample_tokens import sample_tokens
from trivium_kernels.reference.select_beams import select_beams
from trivium_kernels.reference.token_bitmask import apply_token_bitmask
from trivium_kernels.reference.varlen_attention import plan_varlen_attention, varlen_attention

__all__ = [
    "activate",
    "add_layer_norm",
    "add_logit_bias",
    "add_lora",
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
