"""Names for the contents of blocks: chained hashes, so that equal names mean equal tokens in everything before, too.

The chain of a request begins with its tenant's salt, its adapters and its encoder input: requests that differ in one
share nothing. Where embeddings take the place of tokens, digests of their bytes are hashed with the placeholder ids.
Virtual tokens of a soft prompt are placeholders, too; its name says what they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from trivium.embeds import PromptEmbeds
from trivium.scheduler.block_pool import BlockHash

_DIGEST_BYTES = 16
_TOKENS, _EMBEDS = b"", b"embeds"  # what keeps the hashes of both apart


def root_hash(
    salt: str,
    encoder_token_ids: Sequence[int],
    adapters: Sequence[str] = (),
    encoder_embeds: PromptEmbeds | None = None,
) -> BlockHash:
    """What precedes the first block of a request. adapters: of each kind, in the same order for all requests."""
    names = (salt.encode(), *(name.encode() for name in adapters))
    data = b"".join(b"%d:%b" % (len(name), name) for name in names) + array("I", encoder_token_ids).tobytes()
    if encoder_embeds is not None:
        return _hash(data + encoder_embeds.digests_of(0, len(encoder_token_ids)), _EMBEDS)
    return _hash(data)


def chain_hash(parent: BlockHash, token_ids: Sequence[int], digests: bytes = b"") -> BlockHash:
    """The name of a full block of `token_ids` after the block (or root) named `parent`.

    digests: of the embeddings that stand for some of its tokens.
    """
    data = parent + array("I", token_ids).tobytes()
    return _hash(data + digests, _EMBEDS) if digests else _hash(data)


def cross_hashes(root: BlockHash, num_blocks: int) -> tuple[BlockHash, ...]:
    """The names of the cross-attention blocks of the encoder input that `root` was made from."""
    return tuple(
        BlockHash(hashlib.blake2b(root + b"cross%d" % index, digest_size=_DIGEST_BYTES).digest())
        for index in range(num_blocks)
    )


class BlockHashes:
    """The hashes of a request's full blocks, computed once each, as its tokens become known. Owner: the request.

    embeds: of the prompt, where its ids are placeholders.
    """

    def __init__(self, root: BlockHash, embeds: PromptEmbeds | None = None) -> None:
        self.root = root
        self._embeds = embeds
        self._chain: list[BlockHash] = []

    def up_to(self, num_blocks: int, block_size: int, prompt: Sequence[int], output: Sequence[int]) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks of prompt + output, which must have so many tokens."""
        while len(self._chain) < num_blocks:
            start = len(self._chain) * block_size
            tokens = _slice(prompt, output, start, start + block_size)
            digests = b"" if self._embeds is None else self._embeds.digests_of(start, start + block_size)
            self._chain.append(chain_hash(self._chain[-1] if self._chain else self.root, tokens, digests))
        return self._chain[:num_blocks]


def _hash(data: bytes, kind: bytes = _TOKENS) -> BlockHash:
    return BlockHash(hashlib.blake2b(data, digest_size=_DIGEST_BYTES, person=kind).digest())


def _slice(prompt: Sequence[int], output: Sequence[int], start: int, end: int) -> Sequence[int]:
    """Tokens [start, end) of prompt + output."""
    split = len(prompt)
    if end <= split:
        return prompt[start:end]
    return (*prompt[start:], *output[max(0, start - split) : end - split])
