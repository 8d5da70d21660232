"""Grammars on the executor: compiling them beside the steps, and the state of every row that follows one.

A grammar is compiled in a thread before any plan needs it. A row then owns a matcher; it is a function of the grammar
and of the output, so a row that is preempted or resumed replays its output. What a model is forced to begin with
(a BOS, a language) is no part of the output's text, and stands before the grammar unless the grammar takes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher
from torch import Tensor

from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor import transfers
from trivium.executor.grammar_times import GrammarTimes
from trivium.executor.input_batch import InputBatch, Longs
from trivium.executor.model_config import SpecialTokens
from trivium.grammar import Bitmask, GrammarCompiler, GrammarVocabulary, bitmask_width, error_text
from trivium.step import NewRequestData, SlotFailure
from trivium.structured_outputs import PARAM, StructuredOutputsParams
from trivium.tokenizer_backend import load_backend
from trivium_kernels.token_bitmask import ApplyTokenBitmask

logger = logging.getLogger(__name__)

_NUM_THREADS = 2


class GrammarService:
    """Compiles grammars in threads, for the vocabulary of one model, which is read with the first of them."""

    def __init__(self, source: str, revision: str | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._source = source
        self._revision = revision
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._compiler: Future[GrammarCompiler] | None = None

    def prepare(self, params: StructuredOutputsParams, done: Callable[[InvalidRequestError | None], None]) -> None:
        """Compile `params`; `done` is told in a thread of this service why that is impossible, or None.

        Called from the model thread.
        """
        compiler = self._ready_compiler()

        def work() -> None:
            try:
                compiler.result().compile(params)
            except InvalidRequestError as error:
                done(error)
            except Exception:
                logger.exception("a grammar failed")
                done(InvalidRequestError(f"{params.param} cannot be compiled", param=params.param))
            else:
                done(None)

        self._pool.submit(work)

    def matcher(self, params: StructuredOutputsParams) -> LLMatcher:
        """A fresh matcher. Waits only if the grammar was never prepared, or long ago. Raises InvalidRequestError."""
        return self._ready_compiler().result().compile(params)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ready_compiler(self) -> Future[GrammarCompiler]:
        if self._compiler is None:
            self._compiler = self._pool.submit(self._load)
        return self._compiler

    def _load(self) -> GrammarCompiler:
        start = time.perf_counter()
        if not self._eos_token_ids:
            raise InvalidRequestError(f"{PARAM} needs a model with an EOS token", param=PARAM)
        try:
            backend = load_backend(self._source, self._revision)
        except ConfigurationError as error:
            logger.warning("no grammars: %s", error.message)
            raise InvalidRequestError(f"{PARAM} needs a model with a tokenizer", param=PARAM) from None
        compiler = GrammarCompiler(GrammarVocabulary.of(backend, self._vocab_size), self._eos_token_ids)
        logger.info("vocabulary for grammars: %d tokens in %.2f s", self._vocab_size, time.perf_counter() - start)
        return compiler


class GrammarRows:
    """The matchers of the standing batch. Owner: the ModelRunner, in whose thread all of this runs.

    first_token: that of the first column of the scores to mask, a multiple of 32.
    A row without a matcher among `_matchers` has no grammar; one with None follows a beam that its grammar has ended
    without an EOS: whatever comes there is impossible.
    """

    def __init__(
        self,
        service: GrammarService,
        special: SpecialTokens,
        vocab_size: int,
        apply: ApplyTokenBitmask,
        first_token: int = 0,
    ) -> None:
        self._service = service
        self._special = special
        self._width = bitmask_width(vocab_size)
        self._apply = apply
        self._first_word = first_token // 32
        self._eos_mask: Bitmask = np.zeros(self._width, np.int32)
        for token_id in (token_id for token_id in special.eos if token_id < vocab_size):
            self._eos_mask[token_id // 32] |= np.int32(np.uint32(1 << token_id % 32).view(np.int32))
        self._eos_words = [(int(word), int(self._eos_mask[word])) for word in np.flatnonzero(self._eos_mask)]
        self._memory = _MaskMemory(self._width)
        self._matchers: dict[int, LLMatcher | None] = {}  # slot -> state after the row's output
        self._ignores_eos: set[int] = set()  # slots that go on as long as their grammar can
        self._times = GrammarTimes()
        self._failures: dict[int, str] = {}  # slot -> why it cannot go on

    def __len__(self) -> int:
        return len(self._matchers)

    def apply(self, freed_slots: Sequence[int], new_requests: Sequence[NewRequestData], batch: InputBatch) -> None:
        """Forget freed rows; begin the grammars of new ones, which `batch` has already, where their output ends."""
        if self._matchers:
            for slot in freed_slots:
                self._drop(slot)
        for new in new_requests:
            params = new.sampling.structured_outputs
            if params is None:
                continue
            if new.sampling.ignore_eos:
                self._ignores_eos.update(new.beam_slots or (new.slot,))
            try:
                matcher = self._service.matcher(params)
            except InvalidRequestError as error:
                self._matchers[new.slot] = None
                self._failures[new.slot] = error.message
                continue
            self._matchers[new.slot] = matcher
            if new.output_token_ids:
                is_start = len(new.prompt_token_ids) - batch.num_virtual_tokens[new.slot] == 1
                self._replay(new.slot, new.output_token_ids, is_start=is_start)

    def mask(self, scores: Tensor, slots: Longs) -> None:
        """Set what the grammars of the rows `slots` do not allow to -inf in `scores` [num_rows, vocab_size]."""
        found = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._matchers]
        if not found:
            return
        rows, with_grammar = zip(*found, strict=True)
        bitmask = self._compute_masks(with_grammar)
        words = slice(self._first_word, self._first_word + bitmask_width(scores.shape[1]))
        allowed, index = transfers.upload_all((bitmask[:, words], np.array(rows, np.int64)), scores.device)
        self._apply(scores, allowed, index)

    def advance(self, slots: Longs, token_ids: Longs, batch: InputBatch) -> None:
        """The rows `slots` have got `token_ids`, which `batch` has appended already."""
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self._matchers]
        if rows:
            self._consume_all(slots[rows], token_ids[rows], batch)

    def fork(self, slots: Longs, parents: Sequence[int], token_ids: Longs, batch: InputBatch) -> None:
        """The beam in slots[i] goes on from the one that was in slots[parents[i]], by token_ids[i]."""
        sources = [self._matchers.get(int(slots[parent])) for parent in parents]
        if int(slots[0]) not in self._matchers:
            return
        taken: set[int] = set()
        for slot, parent, source in zip(slots.tolist(), parents, sources, strict=True):
            self._matchers[slot] = source.deep_copy() if source is not None and parent in taken else source
            taken.add(parent)
        # Copies are made before any of them moves on.
        self._consume_all(slots, token_ids, batch, may_die=True)

    def start_beams(self, slots: Longs) -> None:
        """The prompt of a beam group is computed: its other rows are where the first one is."""
        first = int(slots[0])
        if first in self._matchers:
            for slot in slots[1:].tolist():
                matcher = self._matchers[first]
                self._matchers[slot] = None if matcher is None else matcher.deep_copy()

    def take_slow(self, slots: Longs) -> tuple[SlotFailure, ...]:
        """Rows among `slots` that have used too much time. They go on until the scheduler takes them away.

        Nothing else may depend on a time: every rank of a split model must do the same.
        """
        slow = self._times.take_slow(slots.tolist())
        for slot in slow:
            logger.warning("slot %d: its grammar takes too long", slot)
        return tuple(SlotFailure(slot, f"{PARAM}: it is too complex: every token takes longer") for slot in slow)

    def take_failures(self, slots: Longs) -> tuple[SlotFailure, ...]:
        """Why rows among `slots` cannot go on, told once."""
        if not self._failures:
            return ()
        found = [slot for slot in slots.tolist() if slot in self._failures]
        return tuple(SlotFailure(slot, self._failures.pop(slot)) for slot in found)

    def _drop(self, slot: int) -> None:
        self._matchers.pop(slot, None)
        self._ignores_eos.discard(slot)
        self._times.forget(slot)
        self._failures.pop(slot, None)

    def _compute_masks(self, slots: Sequence[int]) -> Bitmask:
        """[len(slots), width] what may come next, in memory that the next masks take again.

        Failed rows, and beams whose score is -inf, take anything. A mask that allows nothing does not exist: then the
        matcher is in error.
        """
        bitmask, address = self._memory.of(len(slots))
        row_bytes = 4 * self._width

        def compute(index: int, slot: int) -> None:
            matcher = self._matchers[slot]
            if matcher is None or slot in self._failures:
                bitmask[index] = -1
                return
            matcher.unsafe_compute_mask_ptr(address + index * row_bytes, row_bytes)
            if matcher.is_error():
                self._fail(slot, error_text(matcher.get_error()))
                bitmask[index] = -1

        self._times.compute_masks(slots, compute)
        if self._ignores_eos:
            self._remove_eos(bitmask, slots)
        return bitmask

    def _remove_eos(self, bitmask: Bitmask, slots: Sequence[int]) -> None:
        """From rows that go on as long as their grammar can."""
        for index, slot in enumerate(slots):
            if slot in self._ignores_eos and any(bitmask.item(index, word) & eos for word, eos in self._eos_words):
                without = bitmask[index] & ~self._eos_mask
                if without.any():
                    bitmask[index] = without

    def _replay(self, slot: int, token_ids: Sequence[int], *, is_start: bool) -> None:
        """The output that a row begins with. is_start: its first token may be a forced one."""

        def consume(_index: int, slot: int) -> None:
            for index, token_id in enumerate(token_ids):
                self._consume(slot, token_id, is_first=index == 0 and is_start)

        self._times.consume((slot,), consume)

    def _consume_all(self, slots: Longs, token_ids: Longs, batch: InputBatch, *, may_die: bool = False) -> None:
        tokens = token_ids.tolist()
        is_first = (batch.num_own_tokens(slots) == 2).tolist()

        def consume(index: int, slot: int) -> None:
            self._consume(slot, tokens[index], is_first=is_first[index], may_die=may_die)

        self._times.consume(slots.tolist(), consume)

    def _consume(self, slot: int, token_id: int, *, is_first: bool, may_die: bool = False) -> None:
        matcher = self._matchers[slot]
        if matcher is None or slot in self._failures or (matcher.is_stopped() and token_id in self._special.eos):
            return
        if matcher.try_consume_tokens([token_id]) == 1:
            return
        if matcher.is_error():
            self._fail(slot, error_text(matcher.get_error()))
        elif is_first and token_id not in self._special.eos:
            return  # forced, and stands before the grammar
        elif may_die or token_id in self._special.eos:
            self._matchers[slot] = None
        else:
            self._fail(slot, f"token {token_id} was generated, which it does not allow")

    def _fail(self, slot: int, reason: str) -> None:
        logger.warning("slot %d: its grammar cannot go on: %s", slot, reason)
        self._failures[slot] = f"{PARAM}: {reason}"


class _MaskMemory:
    """Memory for the masks of a step, kept from one step to the next."""

    def __init__(self, width: int) -> None:
        self._bitmask: Bitmask = np.empty((0, width), np.int32)
        self._address = 0

    def of(self, num_rows: int) -> tuple[Bitmask, int]:
        """[num_rows, width] with whatever the last masks were, and where it begins."""
        if num_rows > len(self._bitmask):
            self._bitmask = np.empty((2 * num_rows, self._bitmask.shape[1]), np.int32)
            self._address = self._bitmask.ctypes.data
        return self._bitmask[:num_rows], self._address
