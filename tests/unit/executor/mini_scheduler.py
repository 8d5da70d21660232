"""A scheduler of fifty lines, to drive a ModelRunner: it grants blocks in random order and stops rows, nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from trivium.config import PromptAdapter
from trivium.embeds import PromptEmbeds
from trivium.executor.model_runner import ModelRunner
from trivium.params import SamplingParams
from trivium.step import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@dataclass(slots=True)
class MiniRequest:
    prompt: tuple[int, ...]
    sampling: SamplingParams
    encoder: tuple[int, ...] = ()
    choice_index: int = 0
    adapter: str = ""
    output: list[int] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cross_blocks: list[int] = field(default_factory=list)
    finished: bool = False
    embeds: PromptEmbeds | None = None
    encoder_embeds: PromptEmbeds | None = None
    prompt_adapter: PromptAdapter | None = None

    @property
    def virtual(self) -> tuple[int, ...]:
        """Placeholders of the virtual tokens ahead of the prompt."""
        soft = self.prompt_adapter
        return (0,) * soft.num_virtual_tokens if soft is not None and not soft.of_encoder else ()

    @property
    def encoder_virtual(self) -> tuple[int, ...]:
        soft = self.prompt_adapter
        return (0,) * soft.num_virtual_tokens if soft is not None and soft.of_encoder else ()

    @property
    def num_tokens(self) -> int:
        return len(self.virtual) + len(self.prompt) + len(self.output)

    @property
    def num_encoder_tokens(self) -> int:
        return len(self.encoder_virtual) + len(self.encoder)


class MiniScheduler:
    """chunk: the most tokens a row computes in one step; None computes all it has."""

    def __init__(self, runner: ModelRunner, *, chunk: int | None = None, seed: int = 0) -> None:
        self.runner = runner
        self.info = runner.model_info
        self.chunk = chunk
        self.free_blocks = list(range(self.info.num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        self.free_slots = list(range(self.info.max_num_seqs))
        self.running: list[MiniRequest] = []
        self.waiting: list[MiniRequest] = []
        self.freed: list[int] = []
        self.step_index = 0

    def add(self, prompt: list[int], sampling: SamplingParams = GREEDY, **fields: object) -> MiniRequest:
        request = MiniRequest(tuple(prompt), sampling, **fields)  # type: ignore[arg-type]
        self.waiting.append(request)
        return request

    def preempt(self, request: MiniRequest) -> None:
        self._release(request)
        request.num_computed = 0
        self.waiting.append(request)

    def run(self) -> None:
        while self.running or self.waiting:
            self.step()

    def step(self) -> ModelRunnerOutput:
        plan = self._plan()
        output = self.runner.execute(plan)
        self.runner.check_invariants()
        by_slot = {request.slot: request for request in self.running}
        for slot, count in zip(plan.scheduled_slots, plan.num_scheduled_tokens, strict=True):
            by_slot[slot].num_computed += count
        for slot, token_id in zip(output.slots, output.token_ids, strict=True):
            self._append(by_slot[slot], token_id)
        return output

    def _plan(self) -> SchedulerOutput:
        new_requests, grown_slots, grown_blocks, encoder_slots = [], [], [], []
        freed, self.freed = tuple(self.freed), []
        started, self.waiting = self.waiting, []
        self.running += started
        counts = []
        for request in self.running:
            left = request.num_tokens - request.num_computed
            counts.append(left if self.chunk is None else min(left, self.chunk))
            needed = self._num_blocks(request.num_computed + counts[-1]) - len(request.blocks)
            granted = [self.free_blocks.pop() for _ in range(needed)]
            request.blocks += granted
            if request.slot < 0:
                request.slot = self.free_slots.pop()
                num_cross = self._num_blocks(request.num_encoder_tokens)
                request.cross_blocks = [self.free_blocks.pop() for _ in range(num_cross)]
                new_requests.append(self._new_request_data(request))
                if request.encoder:
                    encoder_slots.append(request.slot)
            elif granted:
                grown_slots.append(request.slot)
                grown_blocks.append(tuple(granted))
        self.step_index += 1
        return SchedulerOutput(
            step=self.step_index,
            scheduled_slots=tuple(request.slot for request in self.running),
            num_scheduled_tokens=tuple(counts),
            new_requests=tuple(new_requests),
            new_blocks=CachedRequestData(tuple(grown_slots), tuple(grown_blocks)),
            encoder_slots=tuple(encoder_slots),
            freed_slots=freed,
        )

    def _new_request_data(self, request: MiniRequest) -> NewRequestData:
        embeds = request.embeds and request.embeds.behind(len(request.virtual))
        encoder_embeds = request.encoder_embeds and request.encoder_embeds.behind(len(request.encoder_virtual))
        return NewRequestData(
            slot=request.slot,
            prompt_token_ids=request.virtual + request.prompt,
            output_token_ids=tuple(request.output),
            num_computed_tokens=request.num_computed,
            block_ids=tuple(request.blocks),
            sampling=request.sampling,
            choice_index=request.choice_index,
            max_tokens=request.sampling.max_tokens or 1,
            encoder_token_ids=request.encoder_virtual + request.encoder,
            cross_block_ids=tuple(request.cross_blocks),
            adapter=request.adapter,
            prompt_embeds=embeds and embeds.rows_from(request.num_computed),
            encoder_embeds=encoder_embeds and encoder_embeds.data,
            prompt_places=embeds.spans if embeds else (),
            encoder_places=encoder_embeds.spans if encoder_embeds else (),
            prompt_adapter=request.prompt_adapter.name if request.prompt_adapter else "",
        )

    def _append(self, request: MiniRequest, token_id: int) -> None:
        request.output.append(token_id)
        stops = request.sampling.stop_token_ids + (() if request.sampling.ignore_eos else self.info.eos_token_ids)
        if token_id in stops or len(request.output) == request.sampling.max_tokens:
            request.finished = True
            self._release(request)

    def _release(self, request: MiniRequest) -> None:
        self.running.remove(request)
        self.freed.append(request.slot)
        self.free_slots.insert(0, request.slot)
        self.free_blocks[:0] = request.blocks + request.cross_blocks
        request.blocks, request.cross_blocks, request.slot = [], [], -1

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.block_size)
