"""A weightless executor that checks the step contract: what it samples depends on every token that was really written.

It keeps a toy KV cache: what a slot contains depends on its token and, as real keys and values do, on all before it. So
a wrong block table, a missing write or a block shared wrongly changes what is sampled.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from trivium.beam_search import BeamSearch, move_blocks
from trivium.config import ModelInfo, PromptAdapter
from trivium.errors import EngineUnavailableError
from trivium.inputs import EncodedPrompt
from trivium.outputs import TokenLogprobs
from trivium.params import SamplingParams
from trivium.scheduler.detokenizer_client import StopHit, TextPush, TextResult
from trivium.scheduler.request import Request
from trivium.step import BeamCandidates, ModelRunnerOutput, NewRequestData, SchedulerOutput, SlotLogprobs
from trivium.tokenizer.detokenizer import IncrementalDetokenizer

EOS = 1
VOCAB = 50


def make_info(**changes: object) -> ModelInfo:
    defaults: dict[str, object] = {
        "name": "toy",
        "architecture": "Toy",
        "is_encoder_decoder": False,
        "max_model_len": 200,
        "max_encoder_len": 0,
        "vocab_size": VOCAB,
        "dtype": "float32",
        "block_size": 4,
        "num_blocks": 32,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "eos_token_ids": (EOS,),
        "decoder_start_token_id": 0,
    }
    return ModelInfo(**{**defaults, **changes})  # type: ignore[arg-type]


def make_request(
    key: int,
    prompt: tuple[int, ...] = (5, 6, 7),
    *,
    encoder: tuple[int, ...] | None = None,
    max_tokens: int = 8,
    output: tuple[int, ...] = (),
    cache_salt: str = "",
    adapter: str = "",
    prompt_adapter: PromptAdapter | None = None,
    **sampling: object,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=key, **sampling)  # type: ignore[arg-type]
    encoded = EncodedPrompt(token_ids=prompt, encoder_token_ids=encoder)
    return Request(
        key,
        encoded,
        params,
        max_tokens=max_tokens,
        output_token_ids=output,
        cache_salt=cache_salt,
        adapter=adapter,
        prompt_adapter=prompt_adapter,
    )


def next_token(encoder: tuple[int, ...], sequence: list[int], seed: int) -> int:
    """What the toy model says after `sequence`: EOS now and then, so that lengths differ."""
    digest = hashlib.blake2b(repr((encoder, sequence, seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_output(request: Request) -> list[int]:
    """The output of `request` run alone, from the definition."""
    output: list[int] = []
    while True:
        sequence = [*request.prompt_token_ids, *output]
        output.append(next_token(request.encoder_token_ids, sequence, request.sampling.seed or 0))
        at_eos = output[-1] == EOS and not request.sampling.ignore_eos and len(output) >= request.sampling.min_tokens
        if at_eos or len(output) == request.max_tokens:
            return output


def next_candidates(
    encoder: tuple[int, ...], sequences: list[list[int]], search: BeamSearch, *, seed: int, slot: int
) -> BeamCandidates:
    """What the toy model says after the sequences of all beams: a few tokens each, some of them EOS."""
    found: list[tuple[float, int, int]] = []
    for beam, (sequence, score) in enumerate(zip(sequences, search.scores, strict=True)):
        digest = hashlib.blake2b(repr((encoder, sequence, seed)).encode(), digest_size=64).digest()
        tokens = {digest[2 * i] % VOCAB: digest[2 * i + 1] for i in range(32)}
        assert len(tokens) >= search.num_candidates, "too few different tokens"
        ranked = sorted(tokens.items(), key=lambda item: -item[1])[: search.num_candidates]
        found += [(score - (256 - value) / 100, beam, token) for token, value in ranked]
    found.sort(key=lambda item: -item[0])
    best = found[: search.num_candidates]
    return BeamCandidates(
        slot,
        tuple(score for score, _, _ in best),
        tuple(beam for _, beam, _ in best),
        tuple(token for _, _, token in best),
    )


def make_search(sampling: SamplingParams, max_tokens: int) -> BeamSearch:
    assert sampling.beam is not None
    return BeamSearch(sampling.beam, sampling, max_tokens, (EOS,))


def expected_beams(request: Request) -> list[list[int]]:
    """The output of every choice of a beam search run alone, from the definition: sequences, and no blocks."""
    search = make_search(request.sampling, request.max_tokens)
    while not search.is_done:
        outputs = [[] if tail is None else [node.token_id for node in tail.nodes()] for tail in search.tails]
        sequences = [[*request.prompt_token_ids, *output] for output in outputs]
        seed = request.sampling.seed or 0
        search.advance(next_candidates(request.encoder_token_ids, sequences, search, seed=seed, slot=0))
    return [[node.token_id for node in hypothesis.tail.nodes()] for hypothesis in search.hypotheses]


def toy_logprobs(encoder: tuple[int, ...], sequence: list[int], token_id: int, num_top: int) -> TokenLogprobs:
    """What the toy model reports of `token_id` after `sequence`."""
    digest = hashlib.blake2b(repr((encoder, sequence, token_id)).encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    top_ids = tuple((number + index) % VOCAB for index in range(num_top))
    return TokenLogprobs(-float(number % 997), 1 + number % VOCAB, top_ids, tuple(-float(index) for index in top_ids))


def expected_logprobs(request: Request, *, of_prompt: bool) -> list[TokenLogprobs]:
    """Of the prompt from its second token on, or of the whole output of `request`, from the definition."""
    prompt, encoder = list(request.prompt_token_ids), request.encoder_token_ids
    sequence = prompt if of_prompt else prompt + expected_output(request)
    num_top = request.sampling.prompt_logprobs if of_prompt else request.sampling.logprobs
    start = 1 if of_prompt else len(prompt)
    return [toy_logprobs(encoder, sequence[:i], sequence[i], num_top or 0) for i in range(start, len(sequence))]


@dataclass
class _Group:
    slots: tuple[int, ...]
    search: BeamSearch


@dataclass
class _Row:
    new: NewRequestData
    tokens: list[int]
    num_computed: int
    blocks: list[int]


@dataclass
class ToyExecutor:
    """Runs plans at once and asserts everything the contract promises."""

    info: ModelInfo
    rows: dict[int, _Row] = field(default_factory=dict)
    groups: dict[int, _Group] = field(default_factory=dict)  # first slot -> group
    last_step: int = 0
    num_encoder_runs: int = 0
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0  # of those computed
    num_copied: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0

    def __post_init__(self) -> None:
        # block -> slot -> (token, digest of the sequence up to and with it)
        self.blocks = [[(-1, b"")] * self.info.block_size for _ in range(self.info.num_blocks)]
        self.host_blocks: dict[int, list[tuple[int, bytes]]] = {}  # those that something was swapped to

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        assert plan.step == self.last_step + 1, "plans come in order"
        self.last_step = plan.step
        assert sum(plan.num_scheduled_tokens) <= self.info.max_num_batched_tokens
        for slot in plan.freed_slots:
            self.rows.pop(slot, None)
            self.groups.pop(slot, None)
        for new in plan.new_requests:
            for slot in new.beam_slots or (new.slot,):
                assert slot not in self.rows, "slot initialised while in use"
                tokens = [*new.prompt_token_ids, *new.output_token_ids]
                blocks = list(new.block_ids) if slot == new.slot else []
                self.rows[slot] = _Row(new, tokens, new.num_computed_tokens, blocks)
            if new.beam_slots:
                self.groups[new.slot] = _Group(new.beam_slots, make_search(new.sampling, new.max_tokens))
        for slot, blocks in zip(plan.new_blocks.slots, plan.new_blocks.block_ids, strict=True):
            self.rows[slot].blocks.extend(blocks)
        self._move_blocks(plan)
        for slot in plan.encoder_slots:
            self._encode(self.rows[slot])
        done = {slot for group in self.groups.values() if group.search.is_done for slot in group.slots}
        sampled, logprobs = [], []
        for slot, count in zip(plan.scheduled_slots, plan.num_scheduled_tokens, strict=True):
            if slot in done:
                continue
            row = self.rows[slot]
            start, token = row.num_computed, self._compute(row, count)
            of_prompt = self._prompt_logprobs(row, start)
            if token is not None:
                sampled.append((slot, token))
            of_token = self._sampled_logprobs(row) if token is not None else None
            if of_token is not None or of_prompt:
                logprobs.append(SlotLogprobs(slot, of_token, start + 1 if of_prompt else 0, of_prompt))
        slots, tokens = tuple(slot for slot, _ in sampled), tuple(token for _, token in sampled)
        scheduled = set(plan.scheduled_slots)
        beams = [self._select(slot, group) for slot, group in self.groups.items() if self._is_due(group, scheduled)]
        return ModelRunnerOutput(plan.step, slots, tokens, tuple(logprobs), tuple(beams))

    def _is_due(self, group: _Group, scheduled: set[int]) -> bool:
        first = self.rows[group.slots[0]]
        if group.search.is_done or group.slots[0] not in scheduled or first.num_computed < len(first.tokens):
            return False
        assert group.search.num_tokens == 0 or scheduled.issuperset(group.slots), "some beams of a group are left out"
        return True

    def _select(self, slot: int, group: _Group) -> BeamCandidates:
        """Read every beam from its blocks, and move beams and blocks on."""
        first, rows = self.rows[slot], [self.rows[beam] for beam in group.slots]
        if group.search.num_tokens == 0:
            sequences = [self._read(first.blocks, first.num_computed)] * len(rows)
        else:
            sequences = [self._read(row.blocks, first.num_computed) for row in rows]
        encoder = tuple(self._read(list(first.new.cross_block_ids), len(first.new.encoder_token_ids)))
        seed = first.new.sampling.seed or 0
        candidates = next_candidates(encoder, sequences, group.search, seed=seed, slot=slot)
        parents = group.search.advance(candidates)
        if group.search.is_done:
            return candidates
        moved, copies = move_blocks([row.blocks for row in rows], parents, first.num_computed, self.info.block_size)
        for source, target in copies:
            self.blocks[target] = list(self.blocks[source])
        tokens = [list(rows[parent].tokens) for parent in parents]
        for row, blocks, before, tail in zip(rows, moved, tokens, group.search.tails, strict=True):
            assert tail is not None
            row.blocks, row.tokens, row.num_computed = blocks, [*before, tail.token_id], first.num_computed
        return candidates

    def _move_blocks(self, plan: SchedulerOutput) -> None:
        for targets in (
            [host for _, host in plan.swapped_out],
            [block for block, _ in plan.swapped_in] + [block for _, block in plan.copied_blocks],
        ):
            assert len(targets) == len(set(targets)), "a block is written twice"
        for block, host in plan.swapped_out:
            assert 0 <= host < self.info.num_host_blocks, "swapped to a host block that does not exist"
            self.host_blocks[host] = list(self.blocks[block])
        for block, host in plan.swapped_in:
            self.blocks[block] = list(self.host_blocks[host])
        copies = [(list(self.blocks[source]), target) for source, target in plan.copied_blocks]
        for content, target in copies:
            self.blocks[target] = content
        self.num_copied += len(plan.copied_blocks)
        self.num_swapped_out += len(plan.swapped_out)
        self.num_swapped_in += len(plan.swapped_in)

    def _encode(self, row: _Row) -> None:
        self.num_encoder_runs += 1
        self._write(list(row.new.cross_block_ids), 0, list(row.new.encoder_token_ids))

    def _compute(self, row: _Row, count: int) -> int | None:
        assert count >= 1
        end = row.num_computed + count
        assert end <= len(row.tokens), "computes tokens that nobody knows"
        self._write(row.blocks, row.num_computed, row.tokens[row.num_computed : end])
        self.num_computed_tokens += count
        self.num_prompt_tokens += max(0, min(end, len(row.new.prompt_token_ids)) - row.num_computed)
        row.num_computed = end
        if end < len(row.tokens) or row.new.beam_slots:
            return None
        encoder = row.new.encoder_token_ids
        sequence = self._read(row.blocks, end)
        written_encoder = tuple(self._read(list(row.new.cross_block_ids), len(encoder)))
        token = next_token(written_encoder, sequence, row.new.sampling.seed or 0)
        row.tokens.append(token)
        return token

    def _sampled_logprobs(self, row: _Row) -> TokenLogprobs | None:
        if row.new.sampling.logprobs is None:
            return None
        return self._logprobs_at(row, len(row.tokens) - 1, row.new.sampling.logprobs)

    def _prompt_logprobs(self, row: _Row, start: int) -> tuple[TokenLogprobs, ...]:
        num_top = row.new.sampling.prompt_logprobs
        if num_top is None or row.new.choice_index != 0:
            return ()
        end = min(row.num_computed, len(row.new.prompt_token_ids) - 1)
        return tuple(self._logprobs_at(row, position + 1, num_top) for position in range(start, end))

    def _logprobs_at(self, row: _Row, position: int, num_top: int) -> TokenLogprobs:
        encoder = tuple(self._read(list(row.new.cross_block_ids), len(row.new.encoder_token_ids)))
        return toy_logprobs(encoder, self._read(row.blocks, position), row.tokens[position], num_top)

    def _write(self, table: list[int], start: int, tokens: list[int]) -> None:
        size = self.info.block_size
        for position, token in enumerate(tokens, start):
            before = self._slot(table, position - 1)[1] if position else b""
            self.blocks[table[position // size]][position % size] = token, digest_of(before, token)

    def _read(self, table: list[int], count: int) -> list[int]:
        """The tokens in the first `count` slots; -1 where a slot's history is not the one before it in `table`."""
        tokens, before = [], b""
        for position in range(count):
            token, digest = self._slot(table, position)
            tokens.append(token if digest == digest_of(before, token) else -1)
            before = digest
        return tokens

    def _slot(self, table: list[int], position: int) -> tuple[int, bytes]:
        return self.blocks[table[position // self.info.block_size]][position % self.info.block_size]


def digest_of(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(4, "little", signed=True), digest_size=8).digest()


class ToyExecutorClient:
    """ExecutorClient around a ToyExecutor. `crash` loses its state; `hold` keeps results back until `release`."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.executor = ToyExecutor(info)
        self.num_connects = 0
        self.plans: list[SchedulerOutput] = []
        self.on_plan: Callable[[SchedulerOutput], None] = lambda plan: None
        self._results: asyncio.Queue[ModelRunnerOutput | None] = asyncio.Queue()

    async def connect(self) -> ModelInfo:
        self.num_connects += 1
        first_step = self.plans[-1].step if self.plans else 0
        self.executor = ToyExecutor(self.info, last_step=first_step)
        self._results = asyncio.Queue()
        return self.info

    def submit(self, plan: SchedulerOutput) -> None:
        self.plans.append(plan)
        self.on_plan(plan)
        self._results.put_nowait(self.executor.execute(plan))

    async def next_result(self) -> ModelRunnerOutput:
        await asyncio.sleep(0)
        result = await self._results.get()
        if result is None:
            raise EngineUnavailableError("toy executor crashed")
        return result

    async def compile_grammar(self, params: object) -> None: ...

    def crash(self) -> None:
        while not self._results.empty():
            self._results.get_nowait()
        self._results.put_nowait(None)

    async def close(self) -> None: ...


ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def toy_text(ids: list[int] | tuple[int, ...]) -> str:
    """The toy language: one letter per token."""
    return "".join(ALPHABET[token_id] for token_id in ids)


class ToyDetokenizerClient:
    """DetokenizerClient over the real IncrementalDetokenizer and the toy language; answers in the next loop turn."""

    def __init__(self) -> None:
        self.pushes: list[TextPush] = []
        self._streams: dict[int, IncrementalDetokenizer] = {}
        self._queue: asyncio.Queue[TextPush | None] = asyncio.Queue()
        self._stopped: set[int] = set()

    def push(self, push: TextPush) -> None:
        self.pushes.append(push)
        self._queue.put_nowait(push)

    def crash(self) -> None:
        """Lose all state and every push without an answer."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def run(self, on_result: Callable[[TextResult], None], on_connect: Callable[[], None]) -> None:
        on_connect()
        while True:
            push = await self._queue.get()
            if push is None:
                self._streams.clear()
                self._stopped.clear()
                on_connect()
            else:
                await asyncio.sleep(0)
                on_result(self._answer(push))

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def _answer(self, push: TextPush) -> TextResult:
        for item in push.opens:
            stream = IncrementalDetokenizer(
                toy_text,
                lambda token_id: token_id == EOS,
                stop=item.stop,
                include_stop_str_in_output=item.include_stop_str_in_output,
            )
            stream.replay(item.replay_ids, item.emitted_chars)
            self._streams[item.handle] = stream
        texts, stops = [], {}
        for index, row in enumerate(push.rows):
            if row.handle in self._stopped:
                texts.append("")
                continue
            text, match = self._streams[row.handle].push(row.token_ids, final=row.final)
            texts.append(text)
            if match is not None:
                stops[index] = StopHit(match.stop_index, match.tokens_kept)
                self._stopped.add(row.handle)
            if row.final or match is not None:
                del self._streams[row.handle]
        for handle in push.closed_handles:
            self._streams.pop(handle, None)
            self._stopped.discard(handle)
        return TextResult(push.sequence, tuple(texts), stops)
