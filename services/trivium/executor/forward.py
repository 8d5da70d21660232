"""What of the standing batch goes through the model in a step: arrays of the batch in, hidden states and logits out.

Reads the batch, writes keys and values. Knows nothing of what is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trivium.executor import transfers
from trivium.executor.adapter_pool import AdapterPool
from trivium.executor.attention import AttentionMetadata, LastTokens, PagedRows
from trivium.executor.decode_tapes import DecodeTapes
from trivium.executor.input_batch import InputBatch, Longs, ScheduledRows
from trivium.executor.kv_cache import KVCache
from trivium.executor.models.model import LanguageModel
from trivium.executor.soft_prompts import SoftPrompts, input_embeds
from trivium.executor.transfers import Array
from trivium_kernels.dispatch import Kernels


@dataclass(frozen=True, slots=True)
class ForwardPasses:
    """Owner: the ModelRunner. It is one rank's; `device` is where all of its tensors are.

    tapes: where decode steps on a CPU can be recorded.
    """

    model: LanguageModel
    kernels: Kernels
    kv_cache: KVCache
    adapters: AdapterPool | None
    soft_prompts: SoftPrompts | None
    device: torch.device
    tapes: DecodeTapes | None = None

    def run_encoder(self, batch: InputBatch, slots: tuple[int, ...]) -> None:
        """Encode the inputs of `slots`, packed, and write their cross-attention KV."""
        if not slots:
            return
        assert self.model.encoder is not None, "encoder slots passed the check of a decoder-only model"
        lens = batch.encoder_lens[list(slots)]
        token_ids = np.concatenate([batch.encoder_token_ids[slot] for slot in slots])
        positions = np.concatenate([np.arange(length) for length in lens])
        if self.adapters is not None:
            self.adapters.use(np.repeat(batch.adapters[list(slots)], lens))
        found = batch.encoder_embeds.find(np.repeat(slots, lens), positions)
        if batch.soft_encoders and self.soft_prompts is not None:
            found = self.soft_prompts.embed_encoder_inputs(batch, slots, token_ids, found)
        slot_mapping = np.concatenate([batch.cross_slot_mapping(slot) for slot in slots])
        ids, places, mapping = transfers.upload_all((_ids(token_ids, found), positions, slot_mapping), self.device)
        cross = self.model.encoder.encode(
            ids, places, bounds(lens), input_embeds(found, self.device)
        )  # [num_tokens, num_layers, 2, num_kv_heads, head_dim]
        batch.encoder_embeds.drop(slots)
        for layer in range(cross.shape[1]):
            key_cache, value_cache = self.kv_cache.layer(layer)
            self.kernels.reshape_and_cache(cross[:, layer, 0], cross[:, layer, 1], key_cache, value_cache, mapping)

    def run_decoder(self, batch: InputBatch, rows: ScheduledRows, *, is_only_sampled: bool = False) -> Tensor:
        """Hidden states [num_tokens, hidden] of the scheduled tokens, in packing order.

        is_only_sampled: nothing will be asked but the logits of rows that sample, so the other tokens may be left out.
        """
        token_ids = batch.token_ids[rows.token_slots, rows.positions].astype(np.int64)
        if self.adapters is not None:
            self.adapters.use(batch.adapters[rows.token_slots])
        found = batch.embeds.find(rows.token_slots, rows.positions) if batch.embeds else None
        arrays = (_ids(token_ids, found), rows.positions, *attention_arrays(batch, rows))
        embeds, cu_seqlens_q = input_embeds(found, self.device), bounds(rows.num_tokens)
        is_decode = len(rows.positions) == len(rows.slots)
        is_narrowed = is_only_sampled and not is_decode and self.adapters is None
        last = self._last_tokens(batch, rows) if is_narrowed else None

        def run(tensors: tuple[Tensor, ...]) -> Tensor:
            ids, places, *of_attention = tensors
            metadata = attention_metadata(of_attention, cu_seqlens_q, batch.limits.max_model_len, last)
            return self.model.decoder.forward(ids, places, self.kv_cache, metadata, embeds)

        if self.tapes is not None and is_decode and found is None and self.tapes.takes(len(rows.slots)):
            return self.tapes.run(arrays, run)
        return run(transfers.upload_all(arrays, self.device))

    def _last_tokens(self, batch: InputBatch, rows: ScheduledRows) -> LastTokens:
        """Of the rows that sample; where none does, of the first one, so that there is something to compute."""
        samples = np.flatnonzero(batch.rows_that_sample(rows))
        wanted = samples if len(samples) else np.zeros(1, np.int64)
        tokens = np.cumsum(rows.num_tokens)[wanted] - 1
        return LastTokens(*transfers.upload_all((wanted, tokens), self.device))

    def compute_logits(self, batch: InputBatch, rows: ScheduledRows, hidden: Tensor) -> tuple[Longs, Tensor]:
        """(slots that sample, their logits [num_sampling, vocab_size], those of this rank's tokens).

        hidden: as `run_decoder` returned it.
        """
        samples = batch.rows_that_sample(rows)
        last_tokens = np.cumsum(rows.num_tokens)[samples] - 1
        if len(last_tokens) < len(hidden):
            hidden = hidden[transfers.upload(last_tokens, self.device)]
        return rows.slots[samples], self.model.decoder.compute_logits(hidden)


def attention_arrays(batch: InputBatch, rows: ScheduledRows) -> list[Array]:
    """Slot mapping; block tables and context lengths; of an encoder-decoder model, those of its encoder inputs."""
    context_lens = batch.num_computed_tokens[rows.slots] + rows.num_tokens
    arrays: list[Array] = [batch.slot_mapping(rows), *_table_of(batch, batch.block_tables, context_lens, rows.slots)]
    if batch.limits.max_encoder_len:
        arrays += _table_of(batch, batch.cross_block_tables, batch.encoder_lens[rows.slots], rows.slots)
    return arrays


def attention_metadata(
    tensors: list[Tensor], cu_seqlens_q: Tensor, max_model_len: int, last: LastTokens | None = None
) -> AttentionMetadata:
    """tensors: those of `attention_arrays`."""
    slot_mapping, tables, context_lens, *cross = tensors
    return AttentionMetadata(
        cu_seqlens_q=cu_seqlens_q,
        slot_mapping=slot_mapping,
        self_rows=PagedRows(tables, context_lens),
        cross_rows=PagedRows(cross[0], cross[1]) if cross else None,
        max_model_len=max_model_len,
        last=last,
    )


def bounds(lens: Longs) -> Tensor:
    """[len(lens) + 1] running sums that start with 0, on the host."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lens))))


def _table_of(batch: InputBatch, tables: Array, context_lens: Longs, slots: Longs) -> list[Array]:
    return [tables[slots, : batch.blocks_for(int(context_lens.max()))], context_lens]


def _ids(token_ids: Longs, embedded: object | None) -> Longs:
    """[num_tokens] ids that can be looked up, whatever they are where embeddings take their place."""
    return token_ids if embedded is None else np.maximum(token_ids, 0)
