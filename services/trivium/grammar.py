"""Grammars by llguidance: from `StructuredOutputsParams` and a vocabulary to a matcher, which tells what may come next.

`GrammarCompiler` is used by the executor, which generates, and by `tokenizer/grammar_check.py`, which refuses
beforehand what takes too long. Knows no torch and no transformers.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from trivium.errors import InvalidRequestError
from trivium.structured_outputs import PARAM, StructuredOutputsParams
from trivium.token_bytes import known_ids, piece_bytes, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bitmask = npt.NDArray[np.int32]

MAX_CACHED_GRAMMARS = 256
MAX_CACHED_CHARS = 2**24
MAX_ERROR_CHARS = 500
NO_TOKEN = "no token of this model's vocabulary can come next"
_WORD_BITS = 32
# A space, or a line break with its indentation: a model that may write as many as it likes often writes nothing else.
_WHITESPACE = r"[ ]|\n[ ]{0,32}"
# llguidance's own defaults, but for what one step may cost: 200000 and 50000 there, 70 ms on a slow core.
_STEP_LEXER_FUEL = 100_000
_STEP_MAX_ITEMS = 20_000
# Tokens of one of these kinds, each by the first that it is of, are allowed at once where a grammar allows all of the
# kind: words, and what stands in a JSON string without an escape, by their number of characters, because both may be
# limited. llguidance's own kinds are the latter of 10, of 30 and of any number, and a third more expensive on average.
_STRING_CHARS = r'[^"\\\x00-\x1F\x7F]'
_KINDS_OF_TOKENS = tuple(
    f"{chars}{count}"
    for chars, counts in (
        ("[a-zA-Z0-9]", ("{1,5}", "{1,10}", "{1,20}", "+")),
        (_STRING_CHARS, ("{1,5}", "{1,10}", "{1,20}", "{1,30}", "+")),
    )
    for count in counts
)


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """What grammars need of a tokenizer. tokens: the bytes of every id of the model; empty where there is no token."""

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, backend: PreTrainedTokenizerBase, vocab_size: int | None = None) -> GrammarVocabulary:
        """The first `vocab_size` tokens of `backend`, None for all it has.

        Raises InvalidRequestError if its text is not made of the bytes of its tokens.
        """
        to_bytes = piece_bytes(backend)
        if to_bytes is None:
            raise InvalidRequestError(
                f"{PARAM} is not supported: this model's tokenizer does not write its tokens one after the other",
                param=PARAM,
                code="unsupported_parameter",
            )
        known = known_ids(backend)
        size = max(known) + 1 if vocab_size is None else vocab_size
        tokens = tuple(to_bytes(token_id) if token_id in known else b"" for token_id in range(size))
        special = {*special_ids(backend), *_unknown_ids(backend)}
        return cls(tokens, tuple(sorted(token_id for token_id in special if token_id < size)))


def _unknown_ids(backend: PreTrainedTokenizerBase) -> set[int]:
    return set() if backend.unk_token_id is None else {int(backend.unk_token_id)}


def bitmask_width(vocab_size: int) -> int:
    """Words of 32 tokens."""
    return -(-vocab_size // _WORD_BITS)


class GrammarCompiler:
    """Compiles for one vocabulary, and remembers the last grammars. May be used by several threads."""

    def __init__(self, vocabulary: GrammarVocabulary, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(vocabulary, eos_token_ids)),
            eos_token=list(eos_token_ids),
            slices=list(_KINDS_OF_TOKENS),
        )
        self._limits = LLParserLimits(
            step_lexer_fuel=_STEP_LEXER_FUEL, step_max_items=_STEP_MAX_ITEMS, verbose_errors=False
        )
        self._width = bitmask_width(len(vocabulary.tokens))
        self._cache: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._cached_chars = 0
        self._lock = threading.Lock()

    def find(self, params: StructuredOutputsParams) -> LLMatcher | None:
        """A fresh matcher, if the grammar is remembered."""
        with self._lock:
            matcher = self._cache.get(params)
            if matcher is None:
                return None
            copy = matcher.deep_copy()
            if self._can_begin(copy):
                self._cache.move_to_end(params)
                return copy
            # Copies share a lexer, which has a limit of states: those of all requests together, which have reached it.
            self._forget(params)
            return None

    def compile(self, params: StructuredOutputsParams) -> LLMatcher:
        """A fresh matcher. Takes milliseconds, or for ever: `tokenizer/grammar_check.py` finds out before.

        Raises InvalidRequestError for a grammar that is wrong, too complex, or that no token can begin.
        """
        found = self.find(params)
        if found is not None:
            return found
        matcher = LLMatcher(self._tokenizer, grammar_text(params), log_level=0, limits=self._limits)
        if not self._can_begin(matcher):
            raise refused(params, matcher.get_error())
        with self._lock:
            self._remember(params, matcher)
            return matcher.deep_copy()

    def _can_begin(self, matcher: LLMatcher) -> bool:
        """Else it is in error now."""
        if not matcher.is_error():
            mask = np.empty(self._width, np.int32)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return not matcher.is_error()

    def _remember(self, params: StructuredOutputsParams, matcher: LLMatcher) -> None:
        if params in self._cache:
            return
        self._cache[params] = matcher
        self._cached_chars += _num_chars(params)
        while len(self._cache) > MAX_CACHED_GRAMMARS or self._cached_chars > MAX_CACHED_CHARS:
            self._forget(next(iter(self._cache)))

    def _forget(self, params: StructuredOutputsParams) -> None:
        del self._cache[params]
        self._cached_chars -= _num_chars(params)


class _Vocabulary:
    """What TokenizerWrapper wraps. Grammars take no canonical tokenization, so text is cut by longest match."""

    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary, eos_token_ids: Sequence[int]) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(dict.fromkeys((*vocabulary.special_ids, *eos_token_ids)))
        self.eos_token_id = eos_token_ids[0]
        self._ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens) if token}
        for token_id in self.special_token_ids:
            self._ids.pop(self.tokens[token_id], None)
            self.tokens[token_id] = self.tokens[token_id] or b"<eos>"
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                token_id = self._ids.get(text[start:end])
                if token_id is not None:
                    ids.append(token_id)
                    break
            else:
                end = start + 1  # a byte without a token
            start = end
        return ids


def grammar_text(params: StructuredOutputsParams) -> str:
    """`params` as llguidance reads it. Raises InvalidRequestError."""
    match params.kind:
        case "json":
            return _json_grammar(params, str(params.json))
        case "json_object":
            return _json_grammar(params, '{"type":"object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(str(params.regex))
        case "choice":
            quoted = (json.dumps(choice, ensure_ascii=False) for choice in params.choice or ())
            return LLMatcher.grammar_from_lark("start: " + " | ".join(quoted))
    try:
        return grammar_from("grammar", str(params.grammar))
    except (ValueError, RecursionError, IndexError, AssertionError) as error:
        raise refused(params, str(error)) from None


def _json_grammar(params: StructuredOutputsParams, schema: str) -> str:
    if schema == "false":
        raise refused(params, "unsatisfiable: the schema is false")
    options: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or _WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise refused(params, str(error)) from None


def refused(params: StructuredOutputsParams, reason: str, code: str = "invalid_grammar") -> InvalidRequestError:
    """Why there is no matcher for `params`."""
    return InvalidRequestError(f"{params.param}: {error_text(reason)}", param=params.param, code=code)


def error_text(reason: str) -> str:
    """What llguidance says, in one line of bounded length."""
    if reason.startswith("NoExtension"):
        return NO_TOKEN
    if "<backtrace>" in reason:  # a panic: what it says is for its authors
        return "the compiler of grammars failed"
    return " ".join(reason.replace("<non-verbose/>", "").split())[:MAX_ERROR_CHARS]


def _num_chars(params: StructuredOutputsParams) -> int:
    text = params.json or params.regex or params.grammar or ""
    return 1000 + len(str(text)) + sum(map(len, params.choice or ()))
