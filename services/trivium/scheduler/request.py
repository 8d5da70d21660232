"""One choice of one client request, as the scheduler sees it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from trivium.config import PromptAdapter
from trivium.inputs import EncodedPrompt
from trivium.outputs import NO_TOKEN_LOGPROBS, FinishReason, TokenLogprobs
from trivium.params import SamplingParams
from trivium.scheduler.block_hash import BlockHashes, root_hash

if TYPE_CHECKING:
    from trivium.scheduler.beam_group import BeamGroup


class RequestStatus(StrEnum):
    """WAITING and PREEMPTED requests are in the queue and own no block; RUNNING ones have a slot and blocks.

    What a PREEMPTED request had computed may be in host memory.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """`leader` has computed the whole prompt in its `incarnation`; as long as that lasts, its blocks hold it."""

    leader: Request
    incarnation: int

    @property
    def still_runs(self) -> bool:
        return self.leader.slot >= 0 and self.leader.incarnation == self.incarnation


class Request:
    """State of one choice. Owner: the Scheduler; everybody else only reads.

    The sequence is prompt + output; the prompt begins with the virtual tokens of a soft prompt, if it has one. How far
    it is computed while the request runs, and which of its tokens are in flight, RunningRows counts. `incarnation`
    changes when the request loses its slot.
    """

    def __init__(
        self,
        key: int,
        prompt: EncodedPrompt,
        sampling: SamplingParams,
        *,
        max_tokens: int,
        choice_index: int = 0,
        output_token_ids: tuple[int, ...] = (),
        cache_salt: str = "",
        priority: int = 0,
        tenant: str = "",
        adapter: str = "",
        prompt_adapter: PromptAdapter | None = None,
    ) -> None:
        self.key = key
        self.prompt_adapter = prompt_adapter
        self.num_virtual_tokens = 0  # of the prompt, not of the encoder input
        if prompt_adapter is not None:
            prompt = _behind(prompt, prompt_adapter)
            self.num_virtual_tokens = 0 if prompt_adapter.of_encoder else prompt_adapter.num_virtual_tokens
        self.prompt_token_ids = prompt.token_ids
        self.encoder_token_ids = prompt.encoder_token_ids or ()
        self.embeds = prompt.embeds
        self.encoder_embeds = prompt.encoder_embeds
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.choice_index = choice_index
        self.output_token_ids: list[int] = list(output_token_ids)
        self.priority = priority
        self.tenant = tenant
        self.adapter = adapter
        self.num_prompt_tokens = len(prompt.token_ids)  # virtual tokens included
        self.incarnation = 0
        self.slot = -1
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.ends_in_text = False  # STOP, but by a stop string of a beam: the last token is text like the others
        self.stop_reason: str | int | None = None
        self.cumulative_logprob: float | None = None  # of a finished choice of a beam search
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # prompt tokens that were found in the cache when the request first ran
        adapters = adapter, "" if prompt_adapter is None else prompt_adapter.name
        root = root_hash(cache_salt, self.encoder_token_ids, adapters, prompt.encoder_embeds)
        self.block_hashes = BlockHashes(root, prompt.embeds)
        self.num_named_blocks = 0  # blocks of its table that can be found by others
        # Of the prompt from its second token on, as far as computed. Of virtual tokens, and of what comes first behind
        # them, there are none.
        self.prompt_logprobs = [NO_TOKEN_LOGPROBS] * self.num_virtual_tokens
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None and choice_index == 0
        self.num_lookup_tokens = sampling.num_lookup_tokens
        self.is_plain = not self.num_lookup_tokens  # its rows are as many, and compute as much, as its plans say
        self.siblings: list[Request] = []  # other choices, which wait until this one has computed their common prompt
        self.fork_point: ForkPoint | None = None  # of a sibling, until it runs: who has computed the prompt
        self.beams: BeamGroup | None = None  # of beam search: of what is scheduled, and of the choices it is done for

    def twin(self, key: int) -> Request:
        """A new request for the same prompt and parameters, that has generated nothing and leads a group."""
        twin = copy.copy(self)
        twin.key, twin.choice_index, twin.output_token_ids, twin.siblings = key, 0, [], []
        twin.is_plain = False
        return twin

    @property
    def num_tokens(self) -> int:
        """Length of the sequence as far as it is known: without tokens in flight."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt tokens have still to be computed for their log-probabilities."""
        return self.wants_prompt_logprobs and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def num_skippable_tokens(self) -> int:
        """How many tokens need not be computed if their keys and values are known; the last one always is."""
        return len(self.prompt_logprobs) if self.needs_prompt_logprobs else self.num_tokens - 1

    def add_prompt_logprobs(self, start: int, values: tuple[TokenLogprobs, ...]) -> None:
        """Keep what is new in `values`, the first of which is of position `start`: a preempted prompt comes again."""
        num_known = 1 + len(self.prompt_logprobs) - start
        assert num_known >= 0, f"request {self.key}: log-probabilities before position {start} are missing"
        self.prompt_logprobs.extend(values[num_known:])

    @property
    def num_embeds_bytes(self) -> int:
        return sum(len(embeds.data) for embeds in (self.embeds, self.encoder_embeds) if embeds is not None)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def check_stop(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Whether the newest output token ends the choice, and in `stop_reason` which stop token did it."""
        output, sampling = self.output_token_ids, self.sampling
        if not output:
            return None
        token_id, count = output[-1], len(output)
        if token_id in eos_token_ids and sampling.heeds_eos and count >= sampling.min_tokens_to_eos:
            return FinishReason.STOP
        if token_id in sampling.stop_token_ids and count >= sampling.min_tokens:
            self.stop_reason = token_id
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_tokens else None


def _behind(prompt: EncodedPrompt, adapter: PromptAdapter) -> EncodedPrompt:
    """`prompt` with placeholders for the virtual tokens of `adapter` ahead of it, or of its encoder input."""
    count = adapter.num_virtual_tokens
    virtual = (0,) * count
    if adapter.of_encoder:
        embeds = prompt.encoder_embeds
        return replace(
            prompt,
            encoder_token_ids=virtual + (prompt.encoder_token_ids or ()),
            encoder_embeds=None if embeds is None else embeds.behind(count),
        )
    embeds = prompt.embeds
    return replace(
        prompt, token_ids=virtual + prompt.token_ids, embeds=None if embeds is None else embeds.behind(count)
    )
