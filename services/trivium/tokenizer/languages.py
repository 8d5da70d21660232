"""The languages of a multilingual tokenizer: which there are, and how each one changes what the model is given.

| family | source language | target language |
|---|---|---|
| mBART-50, M2M100, NLLB, PLBart | special tokens around the encoder input | forced as the first generated token |
| mBART | the same | takes the place of the decoder start token |
| Marian with several targets, MADLAD | - | a token before the encoder text: `>>fra<<`, `<2fr>` |
| language tokens `<fr>` among the special tokens | - | the first token of the decoder prompt |

Everything is read once, when the tokenizer is loaded: a request never changes the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from trivium.errors import InvalidRequestError
from trivium.tokenizer.language_codes import is_language, resolve_language, shown_codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL_CODE = re.compile(r"[a-z]{2,3}_(?:[A-Z]{2}|[A-Z][a-z]{3})")
_MADLAD_TOKEN = re.compile(r"<2([a-z]{2,3}(?:_\w+)?)>")
_BRACKETED = re.compile(r"<([a-z]{2})>")


class TargetMode(StrEnum):
    """Where the token of the target language goes."""

    FORCED_BOS = "forced_bos"
    DECODER_START = "decoder_start"
    DECODER_PREFIX = "decoder_prefix"
    ENCODER_TEXT = "encoder_text"
    FIXED = "fixed"  # one language, which needs no token


@dataclass(frozen=True, slots=True)
class TargetToken:
    text: str
    token_id: int


@dataclass(frozen=True, slots=True)
class Affixes:
    """Special token ids before and after a text."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Languages:
    """sources: code -> what surrounds a text of that language, None where nothing depends on it.

    is_target_needed: without a target language the model does not know what to write.
    """

    mode: TargetMode
    targets: Mapping[str, TargetToken | None] = field(default_factory=dict)  # code -> its token
    sources: Mapping[str, Affixes | None] = field(default_factory=dict)
    is_target_needed: bool = False

    def source(self, name: str | None) -> Affixes | None:
        """What surrounds a text of language `name`, None for the tokenizer's default. Raises InvalidRequestError."""
        if name is None:
            return None
        if not self.sources:
            raise InvalidRequestError(
                "source_language is not supported: this model finds out by itself",
                param="source_language",
                code="unsupported_parameter",
            )
        return self.sources[resolve_language(name, self.sources, "source_language")]

    def target(self, name: str | None) -> TargetToken | None:
        """The token of language `name`. Raises InvalidRequestError."""
        if name is None:
            return None
        if not self.targets:
            raise InvalidRequestError(
                "target_language is not supported: this model has one",
                param="target_language",
                code="unsupported_parameter",
            )
        return self.targets[resolve_language(name, self.targets, "target_language")]

    def before(self, text: str, target: TargetToken | None) -> str:
        """`text` with the token of `target` before it, where the family wants it there.

        Raises InvalidRequestError if neither names a target language, or they name different ones.
        """
        if self.mode is not TargetMode.ENCODER_TEXT:
            return text
        stripped = text.lstrip()
        tokens = [token for token in self.targets.values() if token is not None]
        written = next((token for token in tokens if stripped.startswith(token.text)), None)
        if target is None:
            if written is None and self.is_target_needed:
                raise missing_target_language(self.targets)
            return text
        if written is not None and written != target:
            raise InvalidRequestError(
                f"target_language differs from {written.text}, with which the text begins", param="target_language"
            )
        return text if written is not None else f"{target.text} {text}"


def missing_target_language(codes: Mapping[str, object] | None = None) -> InvalidRequestError:
    """A multilingual model was not told which language to write."""
    valid = f", such as {shown_codes(codes)}" if codes else ""
    return InvalidRequestError(
        f"the missing language code: target_language must name one of this model's languages{valid}",
        param="target_language",
        code="missing_language",
    )


def find_languages(backend: PreTrainedTokenizerBase) -> Languages | None:
    """The languages of `backend`, None if it has none. Changes `backend` for a moment: call it before sharing it."""
    if hasattr(backend, "set_src_lang_special_tokens"):
        return _special_token_languages(backend)
    if hasattr(backend, "supported_language_codes"):
        return _marian_languages(backend)
    vocabulary = backend.get_vocab()
    targets = _tokens_like(_MADLAD_TOKEN, vocabulary)
    if len(targets) > 1:
        return Languages(TargetMode.ENCODER_TEXT, targets, is_target_needed=True)
    special = {token: vocabulary[token] for token in backend.all_special_tokens if token in vocabulary}
    targets = {code: token for code, token in _tokens_like(_BRACKETED, special).items() if is_language(code)}
    source = backend.init_kwargs.get("source_lang")
    sources = {source: None} if isinstance(source, str) else {}
    return Languages(TargetMode.DECODER_PREFIX, targets, sources) if len(targets) > 1 else None


def _tokens_like(pattern: re.Pattern[str], vocabulary: Mapping[str, int]) -> dict[str, TargetToken]:
    return {
        match[1]: TargetToken(token, token_id)
        for token, token_id in vocabulary.items()
        if (match := pattern.fullmatch(token))
    }


def _special_token_languages(backend: PreTrainedTokenizerBase) -> Languages | None:
    """The families whose tokenizers have `src_lang`: each language's special tokens, as the tokenizer sets them."""
    targets = _target_tokens(backend)
    if not targets:
        return None
    original = backend.src_lang
    sources: dict[str, Affixes | None] = {}
    for code in targets:
        backend.src_lang = code
        sources[code] = Affixes(tuple(backend.prefix_tokens), tuple(backend.suffix_tokens))
    backend.src_lang = original
    is_mbart = type(backend).__name__ == "MBartTokenizer"
    mode = TargetMode.DECODER_START if is_mbart else TargetMode.FORCED_BOS
    return Languages(mode, targets, sources, is_target_needed=True)


def _target_tokens(backend: PreTrainedTokenizerBase) -> dict[str, TargetToken | None]:
    texts = getattr(backend, "lang_code_to_token", None)
    if texts is None:
        named = list(getattr(backend, "lang_code_to_id", {}))
        found = [token for token in backend.all_special_tokens if _SPECIAL_CODE.fullmatch(token)]
        texts = {token.strip("_"): token for token in (*named, *found)}
    tokens = {code: TargetToken(text, _token_id(backend, text)) for code, text in texts.items()}
    return {code: token for code, token in tokens.items() if token.token_id != backend.unk_token_id}


def _token_id(backend: PreTrainedTokenizerBase, token: str) -> int:
    token_id = backend.convert_tokens_to_ids(token)
    assert isinstance(token_id, int), "one token has one id"
    return token_id


def _marian_languages(backend: PreTrainedTokenizerBase) -> Languages | None:
    """Marian: one source and one target, by name, or a code in the text that chooses among several targets."""
    sources: dict[str, Affixes | None] = {backend.source_lang: None} if backend.source_lang else {}
    codes = backend.supported_language_codes
    if len(codes) > 1:
        tokens = {text.strip("<>"): TargetToken(text, backend.encoder[text]) for text in codes}
        return Languages(TargetMode.ENCODER_TEXT, tokens, sources, is_target_needed=True)
    targets: dict[str, TargetToken | None] = {backend.target_lang: None} if backend.target_lang else {}
    return Languages(TargetMode.FIXED, targets, sources) if sources or targets else None
