"""Log-probabilities in OpenAI's two shapes, and vLLM's `prompt_logprobs`.

Token texts come from the tokenizer service by way of the engine; `TokenTexts` fetches those of a delta before the
delta is written, so that writing waits for nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trivium.engine import EngineClient
from trivium.inputs import EncodedPrompt
from trivium.logprobs import named_ids, to_dicts
from trivium.outputs import ChoiceDelta, Logprob, TokenLogprobs, TokenText
from trivium_gateway.openai_protocol import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
)

LOWEST = -9999.0  # shown for a token of probability 0: JSON has no infinity


@dataclass(frozen=True, slots=True)
class LogprobsForm:
    """What a call wants to see. num_top: of output tokens, and of an echoed prompt; None for no log-probabilities.

    num_prompt_top: of vLLM's field `prompt_logprobs`; None leaves it out. echo: whether completions begin with the
    prompt. shows_special: whether special tokens are part of the text.
    """

    num_top: int | None = None
    num_prompt_top: int | None = None
    echo: bool = False
    shows_special: bool = False

    @property
    def changes_completions(self) -> bool:
        """Whether completions are more than the text of their output."""
        return self.echo or self.num_top is not None

    @property
    def num_engine_prompt_top(self) -> int | None:
        """What the engine has to report of the prompt."""
        wanted = [self.num_prompt_top, self.num_top if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class TokenTexts:
    """The tokens that one call has met. Owner: the Generation."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._texts: dict[int, TokenText] = {}  # token id -> what it stands for

    def __getitem__(self, token_id: int) -> TokenText:
        return self._texts[token_id]

    async def load(self, token_ids: Iterable[int]) -> None:
        """Make `token_ids` known. Raises TriviumError."""
        missing = {token_id for token_id in token_ids if token_id not in self._texts}
        if missing:
            texts = await self._engine.token_texts(missing)
            self._texts.update((token_id, texts[token_id]) for token_id in missing)

    async def load_delta(self, delta: ChoiceDelta) -> None:
        """Make everything known that `delta` names beside the tokens of the prompt."""
        await self.load(named_ids(delta.token_ids, (*delta.logprobs, *delta.prompt_logprobs)))

    def text_of(self, token_ids: Iterable[int], *, shows_special: bool) -> str:
        """The text of whole `token_ids`."""
        tokens = (self._texts[token_id] for token_id in token_ids)
        raw = b"".join(token.raw for token in tokens if shows_special or not token.is_special)
        return raw.decode(errors="replace")

    def prompt_dicts(
        self, prompt: EncodedPrompt, logprobs: Sequence[TokenLogprobs], num_top: int
    ) -> list[dict[int, PromptLogprob] | None]:
        """vLLM's `prompt_logprobs`: None for the first token, which nothing predicts, and for embeddings."""
        cut = [_first(value, num_top) for value in logprobs]
        shown = to_dicts(prompt.token_ids[1:], cut, self._texts)
        return [None, *map(_shown_prompt, shown)]


class CompletionLogprobsWriter:
    """Writes the `logprobs` of one choice, piece by piece: offsets go on from piece to piece."""

    def __init__(self, texts: TokenTexts, form: LogprobsForm) -> None:
        assert form.num_top is not None, "nobody asked for log-probabilities"
        self._texts = texts
        self._num_top = form.num_top
        self._shows_special = form.shows_special
        self._num_chars = 0
        self._begin()

    def prompt(self, prompt: EncodedPrompt, text: str, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """The entries of an echoed prompt, before any others; `text` is what is shown of it. Embeddings have none."""
        of_tokens = [value for value, is_own in zip((None, *logprobs), prompt.is_token, strict=True) if is_own]
        written = self.tokens(prompt.own_ids, of_tokens, text)
        self._num_chars = len(text)
        self._begin()
        return written

    def tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], text: str
    ) -> CompletionLogprobs:
        """The entries of `token_ids`; `text` is their text or its beginning, as far as it is known."""
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, value in zip(token_ids, logprobs, strict=True):
            token = self._texts[token_id]
            written.text_offset.append(self._num_chars)
            self._num_chars += self._count_chars(token, text)
            written.tokens.append(_name(token))
            written.token_logprobs.append(None if value is None else _shown(value.logprob))
            written.top_logprobs.append(None if value is None else self._top(token, value))
        return written

    def _begin(self) -> None:
        """A new text begins: the prompt's or the output's."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_at_start = True

    def _count_chars(self, token: TokenText, text: str) -> int:
        """Characters that `token` completes. Decoders of sentencepiece drop a space at the start of a text."""
        if token.is_special and not self._shows_special:
            return 0
        raw = token.raw
        if self._is_at_start and raw.startswith(b" ") and text and not text.startswith(" "):
            raw = raw[1:]
        self._is_at_start = self._is_at_start and not raw
        return len(self._decoder.decode(raw))

    def _top(self, token: TokenText, value: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and always the token itself."""
        top = _first(value, self._num_top)
        pairs = zip(top.top_ids, top.top_logprobs, strict=True)
        found = {_name(self._texts[top_id]): _shown(logprob) for top_id, logprob in pairs}
        found.setdefault(_name(token), _shown(value.logprob))
        return found


def join(pieces: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Pieces of one choice, as one."""
    whole = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        whole.tokens.extend(piece.tokens)
        whole.token_logprobs.extend(piece.token_logprobs)
        whole.top_logprobs.extend(piece.top_logprobs)
        whole.text_offset.extend(piece.text_offset)
    return whole


def chat_logprobs(texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """The `logprobs` of `token_ids`, a whole choice or a piece of it."""
    content = []
    for token_id, value in zip(token_ids, logprobs, strict=True):
        token = texts[token_id]
        tops = [
            ChatTopLogprob(token=texts[top_id].text, logprob=_shown(logprob), bytes=list(texts[top_id].raw))
            for top_id, logprob in zip(value.top_ids, value.top_logprobs, strict=True)
        ]
        shown = _shown(value.logprob)
        content.append(ChatTokenLogprob(token=token.text, logprob=shown, bytes=list(token.raw), top_logprobs=tops))
    return ChatLogprobs(content=content)


def _first(value: TokenLogprobs, count: int) -> TokenLogprobs:
    return TokenLogprobs(value.logprob, value.rank, value.top_ids[:count], value.top_logprobs[:count])


def _shown(logprob: float) -> float:
    return max(logprob, LOWEST)


def _shown_prompt(of_token: dict[int, Logprob] | None) -> dict[int, PromptLogprob] | None:
    if of_token is None:
        return None
    return {
        token_id: PromptLogprob(logprob=_shown(value.logprob), rank=value.rank, decoded_token=value.decoded_token)
        for token_id, value in of_token.items()
    }


def _name(token: TokenText) -> str:
    r"""The text of a token, or `bytes:\xe4` for one that is no whole character: keys must differ as tokens do."""
    try:
        return token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
