"""Names for the contents of blocks: chained hashes, so that equal names mean equal tokens in everything before, too.

The chain of a request begins with its tenant's salt, its adapter and its encoder input: requests that differ in one
share nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from trivium.scheduler.block_pool import BlockHash

_DIGEST_BYTES = 16


def root_hash(salt: str, encoder_token_ids: Sequence[int], adapter: str = "") -> BlockHash:
    """What precedes the first block of a request."""
    names = b"".join(b"%d:%b" % (len(name), name) for name in (salt.encode(), adapter.encode()))
    data = names + array("I", encoder_token_ids).tobytes()
    return BlockHash(hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest())


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of a full block of `token_ids` after the block (or root) named `parent`."""
    data = parent + array("I", token_ids).tobytes()
    return BlockHash(hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest())


def cross_hashes(root: BlockHash, num_blocks: int) -> tuple[BlockHash, ...]:
    """The names of the cross-attention blocks of the encoder input that `root` was made from."""
    return tuple(
        BlockHash(hashlib.blake2b(root + b"cross%d" % index, digest_size=_DIGEST_BYTES).digest())
        for index in range(num_blocks)
    )


class BlockHashes:
    """The hashes of a request's full blocks, computed once each, as its tokens become known. Owner: the request."""

    def __init__(self, root: BlockHash) -> None:
        self.root = root
        self._chain: list[BlockHash] = []

    def up_to(self, num_blocks: int, block_size: int, prompt: Sequence[int], output: Sequence[int]) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks of prompt + output, which must have so many tokens."""
        while len(self._chain) < num_blocks:
            start = len(self._chain) * block_size
            tokens = _slice(prompt, output, start, start + block_size)
            self._chain.append(chain_hash(self._chain[-1] if self._chain else self.root, tokens))
        return self._chain[:num_blocks]


def _slice(prompt: Sequence[int], output: Sequence[int], start: int, end: int) -> Sequence[int]:
    """Tokens [start, end) of prompt + output."""
    split = len(prompt)
    if end <= split:
        return prompt[start:end]
    return (*prompt[start:], *output[max(0, start - split) : end - split])
