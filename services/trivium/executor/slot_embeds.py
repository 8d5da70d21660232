"""Embeddings that the rows of the standing batch have to compute from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from trivium.embeds import Places

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class SlotEmbeds:
    """Embeddings that slots have to compute from, until they have. Owner: the InputBatch."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._pieces: dict[int, list[tuple[int, Floats]]] = {}  # slot -> (position of the first row, rows) of each

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, slot: int, rows: Floats, *, start: int = 0) -> None:
        """Rows [num_rows, hidden] of the positions from `start` on. Nothing to keep if there are none."""
        if len(rows):
            self._pieces.setdefault(slot, []).append((start, rows))

    def put_places(self, slot: int, data: bytes, places: Places, *, start: int = 0) -> None:
        """Float32 rows of the positions of `places` from `start` on."""
        rows = np.frombuffer(data, "<f4").reshape(-1, max(1, self._hidden_size))
        first = 0
        for begin, end in places:
            begin = max(begin, start)
            if begin < end:
                self.put(slot, rows[first : first + end - begin], start=begin)
                first += end - begin

    def drop(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._pieces.pop(slot, None)

    def find(self, token_slots: Longs, positions: Longs) -> tuple[Longs, Floats] | None:
        """(which of the tokens have embeddings, their rows), None if none has. The arguments are [num_tokens]."""
        tokens, rows = [], []
        for slot, pieces in self._pieces.items():
            of_slot = np.flatnonzero(token_slots == slot)
            if not len(of_slot):
                continue
            for start, embeds in pieces:
                places = positions[of_slot] - start
                inside = (places >= 0) & (places < len(embeds))
                tokens.append(of_slot[inside])
                rows.append(embeds[places[inside]])
        if not any(len(found) for found in tokens):
            return None
        return np.concatenate(tokens), np.concatenate(rows)
