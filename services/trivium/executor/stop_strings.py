"""Stop strings in beam searches: a beam that has completed one is a hypothesis, as in transformers' `generate`.

Elsewhere stop strings are the detokenizer's business. A search must know them when it chooses its beams, so the
executor reads what its tokens say: once, in a thread, when the first such request comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor.input_batch import InputBatch
from trivium.params import SamplingParams
from trivium.step import BeamCandidates
from trivium.token_bytes import known_ids, special_ids, token_bytes
from trivium.tokenizer_backend import load_backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """tokens: the bytes of every id of the model, empty where there is no token. special_ids: what is no text."""

    tokens: tuple[bytes, ...]
    special_ids: frozenset[int]

    def text(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        return b"" if skip_special_tokens and token_id in self.special_ids else self.tokens[token_id]


class TokenTextService:
    """Reads the token texts of one model when they are first needed."""

    def __init__(self, source: str, revision: str | None, vocab_size: int) -> None:
        self._source = source
        self._revision = revision
        self._vocab_size = vocab_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="token-texts")
        self._texts: Future[TokenTexts] | None = None

    def prepare(self, done: Callable[[InvalidRequestError | None], None]) -> None:
        """Read them beside the steps; `done` is told in a thread why that is impossible, or None."""

        def tell(texts: Future[TokenTexts]) -> None:
            error = None if texts.cancelled() else texts.exception()
            if error is not None and not isinstance(error, InvalidRequestError):
                logger.error("token texts failed", exc_info=error)
                error = InvalidRequestError("stop cannot be used with beams", param="stop")
            done(error)

        self._future().add_done_callback(tell)

    def get(self) -> TokenTexts:
        """Waits only if they were never prepared. Raises InvalidRequestError."""
        return self._future().result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _future(self) -> Future[TokenTexts]:
        if self._texts is None:
            self._texts = self._pool.submit(self._load)
        return self._texts

    def _load(self) -> TokenTexts:
        try:
            backend = load_backend(self._source, self._revision)
        except ConfigurationError as error:
            logger.warning("no stop strings for beams: %s", error.message)
            raise InvalidRequestError("stop needs a model with a tokenizer", param="stop") from None
        to_bytes = token_bytes(backend, lambda token_ids: str(backend.decode(token_ids)))
        known = known_ids(backend)
        tokens = tuple(to_bytes(token_id) if token_id in known else b"" for token_id in range(self._vocab_size))
        return TokenTexts(tokens, special_ids(backend))


class StopStrings:
    """The stop strings of one request."""

    def __init__(self, params: SamplingParams, texts: TokenTexts) -> None:
        self._stops = tuple(stop.encode() for stop in params.stop)
        self._num_bytes = max(map(len, self._stops)) - 1  # of what stands before the last token
        self._texts = texts
        self._skips_special_tokens = params.skip_special_tokens

    def completed(self, candidates: BeamCandidates, batch: InputBatch, slots: Sequence[int]) -> tuple[int, ...]:
        """Which of `candidates` end with a token that completes a stop string; `slots` are those of the beams."""
        tails = {beam: self._tail(batch, slots[beam]) for beam in set(candidates.beams)}
        return tuple(
            index
            for index, (beam, token_id) in enumerate(zip(candidates.beams, candidates.token_ids, strict=True))
            if self._completes(tails[beam], self._text(token_id))
        )

    def _completes(self, tail: bytes, text: bytes) -> bool:
        return any(stop in tail[len(tail) - min(len(tail), len(stop) - 1) :] + text for stop in self._stops)

    def _tail(self, batch: InputBatch, slot: int) -> bytes:
        """The end of what the beam in `slot` says."""
        start, end = int(batch.num_prompt_tokens[slot]), int(batch.num_tokens[slot])
        tail = b""
        while end > start and len(tail) < self._num_bytes:
            end -= 1
            tail = self._text(int(batch.token_ids[slot, end])) + tail
        return tail

    def _text(self, token_id: int) -> bytes:
        return self._texts.text(token_id, skip_special_tokens=self._skips_special_tokens)
