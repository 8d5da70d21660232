"""Prompts that are cut to a number of tokens, where a caller asks for it; nothing is ever cut otherwise.

`truncate_prompt_tokens` of vLLM, for texts with what transformers' tokenizers do (`truncation=True`): the special
tokens that they put around a text stay. A prompt of a decoder-only model keeps its end, an encoder input its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trivium.config import ModelInfo
from trivium.params import SamplingParams

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Truncation:
    """num_tokens: how many to keep, -1 for what the model takes. side: which end goes, None for the model's kind.

    num_reserved: output tokens that -1 leaves room for.
    """

    num_tokens: int
    side: str | None = None
    num_reserved: int = 1

    @classmethod
    def of(cls, sampling: SamplingParams) -> Self | None:
        """What `sampling` asks for, None for nothing."""
        if sampling.truncate_prompt_tokens is None:
            return None
        return cls(sampling.truncate_prompt_tokens, sampling.truncation_side, sampling.max_tokens or 1)

    def limit(self, info: ModelInfo) -> int:
        """The most tokens that are kept."""
        if self.num_tokens != -1:
            return self.num_tokens
        return info.max_encoder_len if info.is_encoder_decoder else max(1, info.max_model_len - self.num_reserved)

    def cut(self, ids: Ids, added: Ids, info: ModelInfo) -> Ids:
        """`ids` with at most `limit` tokens. added: what the tokenizer makes of an empty text."""
        limit = self.limit(info)
        if len(ids) <= limit:
            return ids
        suffix = _common_suffix(ids, added)
        prefix = _common_prefix(ids, added[: len(added) - len(suffix)])
        room = limit - len(prefix) - len(suffix)
        if room < 0:
            prefix, suffix, room = (), (), limit
        inner = ids[len(prefix) : len(ids) - len(suffix)]
        side = self.side or ("right" if info.is_encoder_decoder else "left")
        kept = inner[:room] if side == "right" else inner[len(inner) - room :]
        return prefix + kept + suffix


def _common_prefix(ids: Ids, added: Ids) -> Ids:
    count = 0
    while count < len(added) and ids[count] == added[count]:
        count += 1
    return added[:count]


def _common_suffix(ids: Ids, added: Ids) -> Ids:
    return _common_prefix(ids[::-1], added[::-1])[::-1]
