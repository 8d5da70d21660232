"""`Tokenizer`: the one class of this package that knows transformers.

Loads any tokenizer that transformers can load, without remote code, and offers the four things a server needs:
encode, render a chat, decode, and detokenize a stream. What depends on languages is in `languages.py`. transformers is
imported on first load, so that importing this module costs nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.errors import InvalidRequestError
from trivium.grammar import GrammarVocabulary
from trivium.inputs import EncodedPair, PairTexts
from trivium.outputs import TokenText
from trivium.token_bytes import known_ids, special_ids, token_bytes
from trivium.tokenizer import chat_template
from trivium.tokenizer.chat_template import MAX_PROMPT_CHARS, Messages
from trivium.tokenizer.detokenizer import Decode, IncrementalDetokenizer
from trivium.tokenizer.embeds_marks import EmbedsMarks, has_embeds, put_marks
from trivium.tokenizer.languages import Languages, TargetMode, find_languages
from trivium.tokenizer.plain_text import PlainText
from trivium.tokenizer_backend import load_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_TEXTS = 2048


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as the model reads it."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """The tokenizer of one model. It does not change after it was made, and may be used by several threads at once."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        self._backend = backend
        self._target_backend = _target_side(backend)
        self._languages = find_languages(backend)
        self._marks = EmbedsMarks(backend)
        self._decode = _fast_decode(backend) or _slow_decode(backend)
        self._special_ids = special_ids(backend)
        self._plain_text = PlainText(backend)
        self._has_token = _token_test(backend)
        self._token_bytes = token_bytes(backend, self._decode)
        # The first call takes truncation and padding settings out of the backend; later calls change nothing.
        self.encode([" "])
        self.encode_pair(PairTexts(decoder=" "))

    @classmethod
    def load(cls, source: str, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a local directory, a bundled model or a hub id.

        Imports torch if it can be imported (`torch_free.forbid_torch` sees to that). Raises ConfigurationError, in
        one line, if there are no tokenizer files or transformers cannot read them.
        """
        return cls(load_backend(source, revision))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's own may be larger."""
        return len(self._backend)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._backend.chat_template)

    @property
    def languages(self) -> Languages | None:
        """None if the model has no languages to choose from."""
        return self._languages

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; text that spells a special token becomes that token.

        Raises InvalidRequestError for too many or too long texts, and for lone surrogates.
        """
        return self._encode_by(self._backend, texts, add_special_tokens=add_special_tokens)

    def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """Both sides of an encoder-decoder prompt: the decoder's by the target side's model, without special tokens.

        Raises InvalidRequestError as `encode` does, and for languages that the model does not have.
        """
        languages = self._languages
        if languages is None:
            for name in ("source_language", "target_language"):
                if getattr(texts, name) is not None:
                    raise InvalidRequestError(
                        f"{name} is not supported: this model has no languages to choose from",
                        param=name,
                        code="unsupported_parameter",
                    )
            languages = Languages(TargetMode.FIXED)
        affixes, target = languages.source(texts.source_language), languages.target(texts.target_language)
        encoder: list[int] = []
        if texts.encoder is not None:
            text = languages.before(texts.encoder, target)
            (encoder,) = self.encode([text], add_special_tokens=affixes is None)
            if affixes is not None:
                encoder = [*affixes.prefix, *encoder, *affixes.suffix]
        decoder: list[int] = []
        if texts.decoder is not None:
            (decoder,) = self._encode_by(self._target_backend, [texts.decoder], add_special_tokens=False)
        target_id = None if target is None else target.token_id
        mode = languages.mode
        return EncodedPair(
            encoder=tuple(encoder),
            decoder=tuple(decoder),
            decoder_prefix=(target_id,) if target_id is not None and mode is TargetMode.DECODER_PREFIX else (),
            decoder_start_token_id=target_id if mode is TargetMode.DECODER_START else None,
            forced_bos_token_id=target_id if mode is TargetMode.FORCED_BOS else None,
            needs_target_language=languages.is_target_needed and target_id is None and mode is TargetMode.FORCED_BOS,
        )

    @staticmethod
    def _encode_by(
        backend: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[int]]:
        if len(texts) > MAX_TEXTS:
            raise InvalidRequestError(f"{len(texts)} texts in one call, at most {MAX_TEXTS} are taken", param="prompt")
        num_chars = sum(map(len, texts))
        if num_chars > MAX_PROMPT_CHARS:
            raise InvalidRequestError(
                f"the texts have {num_chars} characters, at most {MAX_PROMPT_CHARS} are taken",
                param="prompt",
                code="prompt_too_long",
            )
        if not texts:
            return []
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "the text holds a lone surrogate, which is not a character", param="prompt", code="invalid_unicode"
            ) from None
        encoded = backend(
            list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    @classmethod
    def _encode_one(cls, backend: PreTrainedTokenizerBase, text: str) -> list[int]:
        return cls._encode_by(backend, [text], add_special_tokens=False)[0]

    def render_chat(self, messages: Messages, **settings: Any) -> list[int]:
        """Token ids of a chat, by the model's template; the template writes the special tokens itself.

        The k-th part of type "prompt_embeds" is the id -1 - k. `settings` are those of `chat_template.render`, which
        raises InvalidRequestError.
        """
        return self.chat(messages, **settings).token_ids

    def chat(
        self, messages: Messages, *, run: Callable[[Callable[[], str]], str] | None = None, **settings: Any
    ) -> RenderedChat:
        """The prompt of a chat; `settings` are those of `chat_template.render`, which raises.

        The k-th part of type "prompt_embeds" is the id -1 - k. What users and tools say holds no special tokens,
        whatever it looks like. run: runs the template.
        """
        chat_template.check_messages(messages)
        try:
            plain = self._plain_text.mark(messages)
        except RecursionError:
            raise InvalidRequestError(
                "messages are nested too deeply", param="messages", code="invalid_messages"
            ) from None
        marked, num_embeds = messages if plain is None else plain, 0
        if has_embeds(marked):
            marked, num_embeds = put_marks(marked)

        def render() -> str:
            return chat_template.render(self._backend, marked, **settings)

        text = render() if run is None else run(render)
        if num_embeds:
            encode = None if plain is not None else self._encode_one
            ids = self._marks.encode(text, num_embeds, encode)
        elif plain is not None:
            ids = self._plain_text.encode(text)
        else:
            ids = self._encode_one(self._backend, text)
        return RenderedChat(self._plain_text.unmark(text), ids)

    def copy_backend(self) -> PreTrainedTokenizerBase:
        """A copy of transformers' tokenizer, for a caller to keep."""
        return copy.deepcopy(self._backend)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token have none."""
        is_silent = self._silence(skip_special_tokens)
        return self._decode([token_id for token_id in token_ids if not is_silent(token_id)])

    def token_texts(self, token_ids: Iterable[int]) -> list[TokenText]:
        """What each of `token_ids` stands for, alone."""
        return [self._token_text(token_id) for token_id in token_ids]

    def grammar_vocabulary(self) -> GrammarVocabulary:
        """What grammars need of the vocabulary. Raises InvalidRequestError if this tokenizer allows for none."""
        return GrammarVocabulary.of(self._target_backend)

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ) -> IncrementalDetokenizer:
        """A new output stream."""
        return IncrementalDetokenizer(
            self._decode,
            self._silence(skip_special_tokens),
            stop=stop,
            include_stop_str_in_output=include_stop_str_in_output,
        )

    def _token_text(self, token_id: int) -> TokenText:
        if not self._has_token(token_id):
            return TokenText("", b"")
        raw = self._token_bytes(token_id)
        return TokenText(raw.decode(errors="replace"), raw, token_id in self._special_ids)

    def _silence(self, skip_special_tokens: bool) -> Callable[[int], bool]:
        has_token, skipped = self._has_token, self._special_ids if skip_special_tokens else frozenset()
        return lambda token_id: token_id in skipped or not has_token(token_id)


def _fast_decode(backend: PreTrainedTokenizerBase) -> Decode | None:
    """Decoding by the Rust tokenizer itself, None if there is none or its Python wrapper decodes differently."""
    from transformers import TokenizersBackend

    if not isinstance(backend, TokenizersBackend) or type(backend)._decode is not TokenizersBackend._decode:
        return None
    rust = backend.backend_tokenizer
    return lambda token_ids: str(rust.decode(token_ids, skip_special_tokens=False))


def _slow_decode(backend: PreTrainedTokenizerBase) -> Decode:
    """Decoding by transformers. Spaces are left alone: cleaning them up would change text that is already out."""

    # Output is of the target side, also where both sides share a vocabulary.
    settings = {"use_source_tokenizer": False} if hasattr(backend, "spm_target") else {}

    def decode(token_ids: list[int]) -> str:
        text = backend.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, **settings)
        assert isinstance(text, str), f"decode gave {type(text).__name__}"
        return text

    return decode


def _target_side(backend: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`backend`, or where the output has a sentencepiece model of its own, a copy that encodes by it."""
    if not hasattr(backend, "spm_target"):
        return backend
    target = copy.copy(backend)
    target._switch_to_target_mode()
    target._switch_to_input_mode = lambda: None  # every call begins with it
    return target


def _token_test(backend: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    known = known_ids(backend)
    return range(len(known)).__contains__ if max(known) == len(known) - 1 else known.__contains__
