"""The soft prompts of one model, and what a step does for rows that have one.

As PEFT has it: embeddings of virtual tokens go ahead of those of the prompt; of an encoder input all tokens go in as
embeddings then. A prefix is not computed: where a plan says to, its keys and values are copied to the row's blocks.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from trivium.config import PromptAdapter
from trivium.errors import ConfigurationError
from trivium.executor import transfers
from trivium.executor.input_batch import InputBatch, Longs, ScheduledRows
from trivium.executor.kv_cache import KVCache
from trivium.executor.models.model import InputEmbeds, LanguageModel
from trivium.executor.parallel.shard import Shard
from trivium.executor.peft import HUB_PATTERNS
from trivium.executor.slot_embeds import Floats
from trivium.executor.soft_prompt import SoftPrompt, read_soft_prompt
from trivium.model_source import find_model
from trivium_kernels.dispatch import Kernels

logger = logging.getLogger(__name__)


class SoftPrompts:
    """Owned by the ModelRunner, and touched only by its thread. by_name: those that are loaded."""

    def __init__(
        self, model: LanguageModel, kernels: Kernels, shard: Shard, *, max_tokens: int, device: torch.device
    ) -> None:
        self.by_name: dict[str, SoftPrompt] = {}
        self._device = device
        self._model = model
        self._shard = shard
        self._kernels = kernels
        self._max_tokens = max_tokens

    @property
    def described(self) -> tuple[PromptAdapter, ...]:
        """What others need to know of those that are loaded."""
        return tuple(PromptAdapter(name, soft.num_tokens, soft.of_encoder) for name, soft in self.by_name.items())

    def load(self, name: str, source: str) -> PromptAdapter:
        """Load a soft prompt from a directory or the hub. Raises ConfigurationError, having changed nothing."""
        try:
            directory = find_model(source, None, patterns=HUB_PATTERNS)
            soft = read_soft_prompt(directory, self._model, self._shard, self._max_tokens)
            if soft.keys_values is not None:
                soft = replace(soft, keys_values=soft.keys_values.to(self._device, self._model.kv_shape.dtype))
        except ConfigurationError as error:
            raise ConfigurationError(f"prompt adapter {name!r}: {error.message}") from None
        self.by_name[name] = soft
        logger.info("prompt adapter %s: %d virtual tokens", name, soft.num_tokens)
        return PromptAdapter(name, soft.num_tokens, soft.of_encoder)

    def embed_encoder_inputs(
        self, batch: InputBatch, slots: tuple[int, ...], token_ids: Longs, found: tuple[Longs, Floats] | None
    ) -> tuple[Longs, Floats] | None:
        """`found` (as of `SlotEmbeds.find`) with embeddings for all other tokens of the inputs with virtual tokens.

        token_ids: [num_tokens] of the inputs of `slots`, packed.
        """
        pieces = [] if found is None else [found]
        start = 0
        for slot in slots:
            end = start + int(batch.encoder_lens[slot])
            soft = batch.soft_encoders.get(slot)
            if soft is not None and soft.rows is not None:
                own = np.arange(start + soft.num_tokens, end)
                if found is not None:
                    own = np.setdiff1d(own, found[0])
                pieces += [(np.arange(start, start + soft.num_tokens), soft.rows), (own, self._embed(token_ids[own]))]
            start = end
        if not pieces:
            return None
        return np.concatenate([tokens for tokens, _ in pieces]), np.concatenate([rows for _, rows in pieces])

    def copy_prefixes(self, batch: InputBatch, rows: ScheduledRows, kv_cache: KVCache) -> ScheduledRows:
        """What of `rows` is left to compute when the part that is a given prefix has been copied to their blocks."""
        computed = batch.num_computed_tokens[rows.slots]
        counts = np.clip(batch.prefix_lens[rows.slots] - computed, 0, rows.num_tokens)
        if not counts.any():
            return rows
        for row in np.flatnonzero(counts):
            self._copy(batch, int(rows.slots[row]), int(computed[row]), int(counts[row]), kv_cache)
        batch.num_computed_tokens[rows.slots] += counts
        left = rows.num_tokens - counts
        return batch.pack_rows(rows.slots[left > 0], left[left > 0])

    def _copy(self, batch: InputBatch, slot: int, start: int, count: int, kv_cache: KVCache) -> None:
        keys_values = batch.prefixes[slot]
        slots = transfers.upload(batch.slot_mapping_of(slot, np.arange(start, start + count)), keys_values.device)
        for layer in range(len(keys_values)):
            key, value = keys_values[layer, :, start : start + count].unbind()
            self._kernels.reshape_and_cache(key, value, *kv_cache.layer(layer), slots)

    def _embed(self, token_ids: Longs) -> Floats:
        assert self._model.encoder is not None, "virtual tokens of the encoder of a model without one"
        embedded = self._model.encoder.word_embeddings(transfers.upload(token_ids, self._device))
        return transfers.download(embedded.float())


def input_embeds(found: tuple[Longs, Floats] | None, device: torch.device) -> InputEmbeds | None:
    return None if found is None else InputEmbeds(*transfers.upload_all(found, device))
