"""Steps whose tokens stay on the device: the next step is queued before anybody knows what this one has sampled.

A row that samples plainly needs nothing of its last token but the token itself, and that is on the device already. So
the host counts it as UNKNOWN, goes on planning, and learns it when the copy has come. A row may have ended by then, by
an EOS in a step whose result was on its way: what it computed meanwhile lies in its own blocks and is dropped.

Order of side effects of a step: keys and values, last tokens on the device; lengths of the rows. When its tokens come:
token ids and ends of rows whose slot has not been given away since. Steps end in the order in which they started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.decode_graphs import DecodeGraphs, GraphRecorder
from trivium.executor.forward import ForwardPasses, attention_arrays, attention_metadata, bounds
from trivium.executor.input_batch import UNKNOWN, BatchLimits, InputBatch, Longs, ScheduledRows
from trivium.executor.logits_processors import NOT_FORCED
from trivium.executor.sampler import Sampler
from trivium.executor.transfers import Array, Download
from trivium.step import ModelRunnerOutput
from trivium_kernels.sample_tokens import TokenSampling

# Of the arrays of a step before those of attention, and of its slot mapping: what stands in a row of no request.
_FILLERS: tuple[float, ...] = (0, 0, 0, 0, 0, NOT_FORCED, 0.0, 0, 1.0, 0.0, 0, 0, 0, -1)
_TOKEN_SLOTS, _SLOTS = 1, 4  # places among them


class StartedStep(Protocol):
    """A step that has changed the standing batch; its results may still be on their way."""

    @property
    def is_done(self) -> bool:
        """Whether `result` does not wait."""
        ...

    def result(self) -> ModelRunnerOutput: ...


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step that was waited for."""

    output: ModelRunnerOutput
    is_done: bool = True

    def result(self) -> ModelRunnerOutput:
        return self.output


class DeferredSteps:
    """Owned by the ModelRunner, and used in its thread. It has a model's last tokens, [max_num_seqs + 1] on the device.

    The last of them belongs to no slot: rows that fill up a step write there.
    """

    def __init__(
        self, passes: ForwardPasses, sampler: Sampler, limits: BatchLimits, recorder: GraphRecorder | None
    ) -> None:
        self._passes = passes
        self._sampler = sampler
        self._limits = limits
        self._no_slot = max_num_seqs = limits.max_num_seqs
        self._graphs: DecodeGraphs | None = None
        if recorder is not None and passes.model.can_be_recorded:
            self._graphs = DecodeGraphs(recorder, max_num_seqs, passes.device)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=passes.device)
        self._under_way: deque[DeferredStep] = deque()

    def __len__(self) -> int:
        """Steps under way."""
        return len(self._under_way)

    def takes(self, batch: InputBatch, slots: Sequence[int]) -> bool:
        """Whether a step of `slots` needs nothing that is not on the device."""
        if not slots or len(batch.embeds) or batch.prefixes:
            return False
        rows = np.array(slots, np.int64)
        output_lens = batch.num_tokens[rows] - batch.num_prompt_tokens[rows]
        columns = batch.sampling
        return bool((columns.is_plain[rows] & (output_lens >= columns.min_tokens[rows])).all())

    def start(self, batch: InputBatch, rows: ScheduledRows, step: int) -> StartedStep:
        """Queue a step of rows that `takes` has taken."""
        passes = self._passes
        samples = np.flatnonzero(batch.rows_that_sample(rows))
        slots = rows.slots[samples]
        if passes.adapters is not None:
            passes.adapters.use(batch.adapters[rows.token_slots])
        arrays = self._arrays(batch, rows, samples)
        size = self._recorded_size(rows, len(samples))
        if size is None or self._graphs is None:
            tensors = transfers.upload_all(arrays, passes.device)
            token_ids = self._run(tensors, bounds(rows.num_tokens))
        else:
            cu_seqlens_q = bounds(np.ones(size, np.int64))
            filled = self._filled(arrays, size)
            token_ids, tensors = self._graphs.run(size, filled, lambda inputs: self._run(inputs, cu_seqlens_q))
        self._last_tokens.index_copy_(0, tensors[_SLOTS], token_ids)
        started = DeferredStep(self, batch, step, slots, Download(token_ids[: len(slots)]))
        batch.advance(rows)
        batch.append_tokens(slots, np.full(len(slots), UNKNOWN, np.int64))
        self._under_way.append(started)
        return started

    def settle(self) -> None:
        """Wait for all steps under way: afterwards the batch knows every token."""
        while self._under_way:
            self.finish(self._under_way[0])

    def finish(self, step: DeferredStep) -> None:
        """Wait for `step` and those before it, and write down what they have sampled."""
        while not step.is_done:
            self._under_way.popleft().write_down(self._sampler)

    def _arrays(self, batch: InputBatch, rows: ScheduledRows, samples: Longs) -> list[Array]:
        """What a step of `rows` is told, of which `samples` sample: see `_run`."""
        slots, columns = rows.slots[samples], batch.sampling
        token_ids = batch.token_ids[rows.token_slots, rows.positions].astype(np.int64)
        return [
            token_ids,
            rows.token_slots,
            rows.positions,
            np.cumsum(rows.num_tokens)[samples] - 1,
            slots,
            self._sampler.forced(batch, slots),
            columns.temperature[slots],
            columns.top_k[slots],
            columns.top_p[slots],
            columns.min_p[slots],
            columns.seed[slots],
            columns.choice_index[slots],
            batch.num_tokens[slots] - batch.num_prompt_tokens[slots],
            *attention_arrays(batch, rows),
        ]

    def _recorded_size(self, rows: ScheduledRows, num_sampling: int) -> int | None:
        """How many rows the step has as a recorded one; None if it cannot be one."""
        adapters = self._passes.adapters
        is_decode = num_sampling == len(rows.positions) and not (adapters is not None and adapters.groups)
        return self._graphs.size_for(num_sampling) if self._graphs is not None and is_decode else None

    def _filled(self, arrays: Sequence[Array], size: int) -> list[Array]:
        """The arrays of a step of `size` rows: the last ones of no slot and without keys, which write nowhere.

        Block tables get the width of the longest sequence that is served.
        """
        widths = iter(-(-length // self._limits.block_size) for length in self._table_lens())
        fillers = [*_FILLERS, *[0] * (len(arrays) - len(_FILLERS))]
        fillers[_TOKEN_SLOTS] = fillers[_SLOTS] = self._no_slot
        filled = []
        for array, filler in zip(arrays, fillers, strict=True):
            shape = (size,) if array.ndim == 1 else (size, next(widths))
            target = np.full(shape, filler, array.dtype)
            target[tuple(slice(0, length) for length in array.shape)] = array
            filled.append(target)
        return filled

    def _table_lens(self) -> list[int]:
        """The most tokens that each block table of a row is for."""
        limits = self._limits
        return [limits.max_model_len, *([limits.max_encoder_len] if limits.max_encoder_len else [])]

    def _run(self, tensors: tuple[Tensor, ...], cu_seqlens_q: Tensor) -> Tensor:
        """[num_sampling] token ids, on the device. tensors: those of `_arrays`. May be recorded."""
        token_ids, token_slots, positions, last, _, forced, *rest = tensors
        passes, decoder = self._passes, self._passes.model.decoder
        token_ids = torch.where(token_ids == UNKNOWN, self._last_tokens.index_select(0, token_slots), token_ids)
        metadata = attention_metadata(rest[7:], cu_seqlens_q, self._limits.max_model_len)
        hidden = decoder.forward(token_ids, positions, passes.kv_cache, metadata)
        logits = decoder.compute_logits(hidden.index_select(0, last))
        sampled = passes.kernels.sample_tokens(logits, _sampling(rest[:7]))
        return torch.where(forced >= 0, forced, sampled)


class DeferredStep:
    """A step under way. Owner: DeferredSteps."""

    def __init__(self, steps: DeferredSteps, batch: InputBatch, step: int, slots: Longs, tokens: Download) -> None:
        self._steps = steps
        self._batch = batch
        self._step = step
        self._slots = slots
        self._tokens = tokens
        self._generations = batch.generations[slots]
        self._places = batch.num_tokens[slots]  # where in their sequences the tokens go
        self._output: ModelRunnerOutput | None = None

    @property
    def is_done(self) -> bool:
        return self._output is not None

    def result(self) -> ModelRunnerOutput:
        """Waits for the device. The batch then knows the tokens of this step and of those before it."""
        self._steps.finish(self)
        assert self._output is not None, "a step that was finished has its output"
        return self._output

    def write_down(self, sampler: Sampler) -> None:
        batch, token_ids = self._batch, self._tokens.numbers()
        # A slot that was given away has another row by now, which only `generations` can tell from this one.
        is_same = batch.generations[self._slots] == self._generations
        told = ~(is_same & batch.ended[self._slots])
        slots, tokens, places = (part[is_same & told] for part in (self._slots, token_ids, self._places))
        fits = places < batch.limits.max_model_len
        batch.token_ids[slots[fits], places[fits]] = tokens[fits]
        num_outputs = places + 1 - batch.num_prompt_tokens[slots]
        batch.ended[slots] = sampler.find_ends(batch, slots, tokens, num_outputs)
        self._output = ModelRunnerOutput(self._step, tuple(self._slots[told].tolist()), tuple(token_ids[told].tolist()))


def _sampling(columns: Sequence[Tensor]) -> TokenSampling:
    temperature, top_k, top_p, min_p, seed, choice_index, position = columns
    return TokenSampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        choice_index=choice_index,
        position=position,
    )
