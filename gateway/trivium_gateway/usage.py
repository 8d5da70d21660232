"""Token counts of one API call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from trivium.inputs import EncodedPrompt
from trivium.outputs import ChoiceDelta


@dataclass(slots=True)
class TokenCounts:
    """What the deltas of one call have told so far, of all its choices. Owner: whoever they go to.

    num_cached_tokens: of the prompts; each counts once, whatever the number of its choices.
    """

    num_output_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, delta: ChoiceDelta) -> None:
        self.num_output_tokens += len(delta.token_ids)
        self.add_prompt(delta)

    def add_prompt(self, delta: ChoiceDelta) -> None:
        """What `delta` tells of its prompt, if it is the one that does."""
        self.num_cached_tokens += delta.num_cached_tokens or 0


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """cached_tokens: found in the prefix cache, of encoder-decoder models tokens of decoder prompts."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """As OpenAI counts: the sums over all prompts and all choices.

    The prompt of an encoder-decoder model counts with both sides. A generated end-of-sequence token is output.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is generated."""

    prompt_tokens: int
    total_tokens: int


def count_usage(prompts: Iterable[EncodedPrompt], counts: TokenCounts) -> Usage:
    """Usage of a call with these prompts."""
    num_prompt_tokens = sum(len(prompt.token_ids) + len(prompt.encoder_token_ids or ()) for prompt in prompts)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=counts.num_output_tokens,
        total_tokens=num_prompt_tokens + counts.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.num_cached_tokens),
    )
