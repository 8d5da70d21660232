"""What a stream shows beside text: token ids, and how many tokens there were so far. Most streams show neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import msgspec

from trivium.outputs import ChoiceDelta
from trivium_gateway.generation import Generation
from trivium_gateway.openai_protocol import GenerationFields
from trivium_gateway.usage import TokenCounts, Usage

_NO_USAGE = b'],"usage":null}\n\n'


@dataclass(slots=True)
class StreamExtras:
    """Owner: the ChunkEncoder of one call. counts: so far, where every chunk counts."""

    generation: Generation
    include_usage: bool = False
    counts_always: bool = False
    shows_ids: bool = False
    counts: TokenCounts = field(default_factory=TokenCounts)
    _with_prompt: set[int] = field(default_factory=set)  # choices that have shown the ids of their prompt

    @classmethod
    def of(cls, request: GenerationFields, generation: Generation) -> Self:
        """What `request`, which was checked, asks for."""
        options = request.stream_options
        return cls(
            generation,
            include_usage=options is not None and bool(options.include_usage),
            counts_always=options is not None and bool(options.continuous_usage_stats),
            shows_ids=generation.returns_token_ids,
        )

    @property
    def is_plain(self) -> bool:
        """Whether every event ends the same way."""
        return not self.counts_always and not self.shows_ids

    @property
    def plain_end(self) -> bytes:
        """What follows the choice of an event."""
        return _NO_USAGE if self.include_usage else b"]}\n\n"

    def end(self) -> bytes:
        """The same, where it may count."""
        if not self.counts_always:
            return self.plain_end
        return b'],"usage":%b}\n\n' % msgspec.json.encode(self.usage())

    def usage(self) -> Usage:
        return self.generation.usage(self.counts)

    def ids(self, delta: ChoiceDelta) -> bytes:
        """A field of a choice."""
        return b',"token_ids":%b' % msgspec.json.encode(delta.token_ids) if self.shows_ids else b""

    def prompt_ids(self, choice: int) -> bytes:
        """A field of the first event of `choice`."""
        if not self.shows_ids or choice in self._with_prompt:
            return b""
        self._with_prompt.add(choice)
        return b',"prompt_token_ids":%b' % msgspec.json.encode(self.generation.prompt_of(choice).token_ids)
