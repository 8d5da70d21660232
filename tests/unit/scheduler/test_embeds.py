"""Prompt embeddings in the scheduler: what plans carry, what the caches tell apart, and how much may be kept."""

from __future__ import annotations

import struct

import pytest

from toy import make_info
from trivium.config import SchedulerConfig
from trivium.embeds import MAX_EMBEDS_BYTES, PromptEmbeds
from trivium.errors import OverloadedError
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.params import SamplingParams
from trivium.scheduler.block_hash import BlockHashes, chain_hash, root_hash
from trivium.scheduler.request import Request
from trivium.scheduler.scheduler import Scheduler
from unit.scheduler.test_engine_loop import Client, running

WIDTH = 4


def make_embeds(num_tokens: int, width: int = WIDTH, first: float = 0.0) -> PromptEmbeds:
    values = [first + index for index in range(num_tokens * width)]
    return PromptEmbeds.of(struct.pack(f"<{len(values)}f", *values), num_tokens, width)


def encoded(embeds: PromptEmbeds) -> EncodedPrompt:
    return EncodedPrompt(embeds.placeholder_ids, embeds=embeds)


def request(key: int, prompt: EncodedPrompt, **fields: object) -> Request:
    return Request(key, prompt, SamplingParams(seed=key, max_tokens=4), max_tokens=4, **fields)  # type: ignore[arg-type]


def test_digests_are_of_single_tokens() -> None:
    one, other = make_embeds(3), make_embeds(3, first=WIDTH)  # row i of one is row i - 1 of the other
    assert one.digests_of(1, 3) == other.digests_of(0, 2) and len(one.digests) == 48
    assert one.rows_from(2) == one.data[2 * 4 * WIDTH :] and one.rows_from(3) == b""


def test_hashes_tell_embeddings_tokens_and_other_embeddings_apart() -> None:
    ids, digests = (0, 0), make_embeds(2).digests_of(0, 2)
    root = root_hash("", ())
    hashes = {
        chain_hash(root, ids),
        chain_hash(root, ids, digests),
        chain_hash(root, ids, make_embeds(2, first=9).digests_of(0, 2)),
    }
    roots = {
        root_hash("", ids),
        root_hash("", ids, encoder_embeds=make_embeds(2)),
        root_hash("s", ids, encoder_embeds=make_embeds(2)),
        root,
    }
    assert len(hashes) == 3 and len(roots) == 4
    assert root_hash("", ids, encoder_embeds=make_embeds(2)) == root_hash("", ids, encoder_embeds=make_embeds(2))


def test_a_block_of_prompt_and_output_has_both_in_its_name() -> None:
    embeds = make_embeds(3)
    names = [
        BlockHashes(root_hash("", ()), rows).up_to(1, 4, embeds.placeholder_ids, output)[0]
        for rows, output in ((embeds, [7]), (embeds, [8]), (make_embeds(3, first=1), [7]), (None, [7]))
    ]
    assert len(set(names)) == 4


def test_a_plan_carries_the_rows_that_are_not_computed_yet() -> None:
    embeds = make_embeds(10)
    scheduler = Scheduler(make_info(hidden_size=WIDTH))
    leader, sibling = (request(key, encoded(embeds), choice_index=key) for key in range(2))
    scheduler.add_choices([leader, sibling])
    plan = scheduler.schedule()
    assert plan is not None
    assert [(new.prompt_embeds, new.prompt_places) for new in plan.new_requests] == [(embeds.data, ((0, 10),))]
    assert all(new.encoder_embeds is None for new in plan.new_requests)


def test_an_encoder_input_is_carried_only_to_be_encoded() -> None:
    embeds = make_embeds(6)
    prompt = EncodedPrompt((0,), encoder_token_ids=embeds.placeholder_ids, encoder_embeds=embeds)
    scheduler = Scheduler(make_info(is_encoder_decoder=True, max_encoder_len=40, hidden_size=WIDTH))
    for key in range(2):
        scheduler.add_request(request(key, prompt))
    plan = scheduler.schedule()
    assert plan is not None
    assert [new.encoder_embeds for new in plan.new_requests] == [embeds.data, b""]
    assert plan.encoder_slots == (plan.new_requests[0].slot,)


def test_one_plan_carries_no_more_than_a_message_holds() -> None:
    width = MAX_EMBEDS_BYTES // 4 // 2
    scheduler = Scheduler(make_info(hidden_size=width, max_num_batched_tokens=64))
    data = bytes(4 * width)
    for key in range(3):  # half of the limit each
        embeds = PromptEmbeds(data, 1, width, bytes([key]) * 16)
        scheduler.add_request(request(key, encoded(embeds)))
    plans = [scheduler.schedule() for _ in range(2)]
    assert [len(plan.new_requests) for plan in plans if plan is not None] == [2, 1]


@pytest.mark.asyncio
async def test_embeddings_of_all_requests_have_a_bound() -> None:
    embeds = make_embeds(6)
    config = SchedulerConfig(max_embeds_bytes=2 * len(embeds.data))
    async with running(config, hidden_size=WIDTH) as world:

        def submit(seed: int, n: int = 1) -> Client:
            client = Client(n)
            params = SamplingParams(seed=seed, max_tokens=8, n=n)
            world.loop.submit(GenerationRequest(f"r{seed}", encoded(make_embeds(6, first=seed)), params), client, seed)
            return client

        clients = [submit(1, n=3), submit(2)]  # choices share their prompt
        with pytest.raises(OverloadedError, match="embeddings"):
            submit(3)
        for client in clients:
            await client.done.wait()
        await submit(4).done.wait()
