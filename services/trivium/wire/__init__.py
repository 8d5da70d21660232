"""Every dataclass <-> protobuf conversion, once. Nothing else builds or reads `trivium.v1` domain messages.

A decoder raises ColumnError for malformed columns and InvalidRequestError for values a client may not send.
"""

from trivium.wire.generation import (
    delta_batch_from_proto,
    delta_batch_to_proto,
    delta_from_proto,
    delta_to_proto,
    error_from_proto,
    error_to_proto,
    generation_request_to_proto,
    resume_from_proto,
)
from trivium.wire.logprobs import logprobs_from_proto, logprobs_to_proto
from trivium.wire.model_info import model_info_from_proto, model_info_to_proto
from trivium.wire.prompts import (
    encoded_pair_from_proto,
    encoded_pair_to_proto,
    encoded_prompt_to_prompt,
    pair_texts_from_proto,
    pair_texts_to_proto,
    prompt_from_proto,
    prompt_to_proto,
    rendered_from_proto,
    rendered_to_proto,
    singleton_from_proto,
    singleton_to_proto,
)
from trivium.wire.sampling import (
    sampling_fields_from_proto,
    sampling_params_from_proto,
    sampling_params_to_proto,
    structured_outputs_from_proto,
    structured_outputs_to_proto,
)
from trivium.wire.steps import plan_from_proto, plan_to_proto, result_from_proto, result_to_proto
from trivium.wire.vectors import embed_from_proto, embed_to_proto, vectors_from_proto, vectors_to_proto

__all__ = [
    "delta_batch_from_proto",
    "delta_batch_to_proto",
    "delta_from_proto",
    "delta_to_proto",
    "embed_from_proto",
    "embed_to_proto",
    "encoded_pair_from_proto",
    "encoded_pair_to_proto",
    "encoded_prompt_to_prompt",
    "error_from_proto",
    "error_to_proto",
    "generation_request_to_proto",
    "logprobs_from_proto",
    "logprobs_to_proto",
    "model_info_from_proto",
    "model_info_to_proto",
    "pair_texts_from_proto",
    "pair_texts_to_proto",
    "plan_from_proto",
    "plan_to_proto",
    "prompt_from_proto",
    "prompt_to_proto",
    "rendered_from_proto",
    "rendered_to_proto",
    "result_from_proto",
    "result_to_proto",
    "resume_from_proto",
    "sampling_fields_from_proto",
    "sampling_params_from_proto",
    "sampling_params_to_proto",
    "singleton_from_proto",
    "singleton_to_proto",
    "structured_outputs_from_proto",
    "structured_outputs_to_proto",
    "vectors_from_proto",
    "vectors_to_proto",
]
