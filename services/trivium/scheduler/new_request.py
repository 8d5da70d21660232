"""What the executor is told of a request that enters the batch."""

from __future__ import annotations

from dataclasses import replace

from trivium.params import SamplingParams
from trivium.scheduler.kv_cache_manager import Allocation
from trivium.scheduler.request import Request
from trivium.step import NewRequestData


def new_request_data(request: Request, allocation: Allocation, beam_slots: tuple[int, ...]) -> NewRequestData:
    """What the executor needs to know of a request that enters the batch."""
    num_computed, embeds, encoder_embeds = allocation.num_cached_tokens, request.embeds, request.encoder_embeds
    encoder_rows: bytes | None = None
    if encoder_embeds is not None:
        encoder_rows = encoder_embeds.data if allocation.needs_encoder else b""
    return NewRequestData(
        slot=request.slot,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=tuple(request.output_token_ids),
        num_computed_tokens=num_computed,
        block_ids=allocation.block_ids,
        sampling=_executor_sampling(request),
        choice_index=request.choice_index,
        max_tokens=request.max_tokens,
        encoder_token_ids=request.encoder_token_ids,
        cross_block_ids=allocation.cross_block_ids,
        beam_slots=beam_slots,
        adapter=request.adapter,
        prompt_embeds=None if embeds is None else embeds.rows_from(num_computed),
        encoder_embeds=encoder_rows,
        prompt_places=() if embeds is None else embeds.spans,
        encoder_places=() if encoder_embeds is None else encoder_embeds.spans,
        prompt_adapter="" if request.prompt_adapter is None else request.prompt_adapter.name,
    )


def _executor_sampling(request: Request) -> SamplingParams:
    """The parameters of `request`, without those that it has no use for any more."""
    if request.sampling.prompt_logprobs is None or request.needs_prompt_logprobs:
        return request.sampling
    return replace(request.sampling, prompt_logprobs=None)
