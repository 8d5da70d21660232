"""Token counts of one API call."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from trivium.inputs import EncodedPrompt


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """As OpenAI counts: the sums over all prompts and all choices.

    The prompt of an encoder-decoder model counts with both sides. A generated end-of-sequence token is output.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is generated."""

    prompt_tokens: int
    total_tokens: int


def count_usage(prompts: Iterable[EncodedPrompt], num_output_tokens: int) -> Usage:
    """Usage of a call with these prompts."""
    num_prompt_tokens = sum(len(prompt.token_ids) + len(prompt.encoder_token_ids or ()) for prompt in prompts)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
    )
