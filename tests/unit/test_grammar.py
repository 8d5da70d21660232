"""Masks do not depend on how tokens are grouped for speed, nor a grammar on how often it was used."""

from __future__ import annotations

import functools
import itertools
import json
import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

import trivium.grammar
from trivium.grammar import GrammarCompiler, GrammarVocabulary, bitmask_width
from trivium.structured_outputs import StructuredOutputsParams

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "text": {"type": "string"},
        "email": {"type": "string", "format": "email"},
        "code": {"type": "string", "pattern": "^[A-Za-z0-9_-]{4,25}$"},
        "number": {"type": "number"},
    },
    "required": ["name", "text", "email", "code", "number"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": StructuredOutputsParams(json=json.dumps(_SCHEMA)),
    "object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"[a-z]{3,40}@[a-z0-9 ]{1,7}(\\.[A-Z]+)*"),
    "lark": StructuredOutputsParams(grammar='start: (word " ")* "."\nword: /[a-z\u00e9"]{1,17}/'),
}
EOS = 0


def make_vocabulary() -> GrammarVocabulary:
    """All bytes, and pieces of text of every length up to 40: words, words after a space, signs, whitespace."""
    numbers = random.Random(0)
    alphabets = ["abcdefghijklmnopqrstuvwxyz", "abcXYZ019", '_-.@"\\/{}:,', " \n", "a\u00e9\u4e2d "]
    pieces = {
        start + "".join(numbers.choices(alphabet, k=length))
        for alphabet in alphabets
        for length in range(1, 41)
        for start in ("", " ", '"')
    }
    tokens = (b"<eos>", *(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in sorted(pieces)))
    return GrammarVocabulary(tuple(dict.fromkeys(tokens)), (EOS,))


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_are_the_same_without_kinds_of_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = make_vocabulary()
    quick = GrammarCompiler(vocabulary, (EOS,))
    monkeypatch.setattr("trivium.grammar._KINDS_OF_TOKENS", ())
    plain = GrammarCompiler(vocabulary, (EOS,))
    width = bitmask_width(len(vocabulary.tokens))
    num_masks = 0
    for seed in range(8):
        numbers = random.Random(seed)
        matchers = [compiler.compile(GRAMMARS[name]) for compiler in (quick, plain)]
        for _ in range(60):
            masks = np.zeros((2, width), np.int32)
            for matcher, mask in zip(matchers, masks, strict=True):
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                assert not matcher.is_error()
            assert np.array_equal(masks[0], masks[1])
            num_masks += 1
            allowed = np.flatnonzero(np.unpackbits(masks[0].view(np.uint8), bitorder="little"))
            token_id = int(numbers.choice(allowed))
            if token_id == EOS:
                break
            assert all(matcher.try_consume_tokens([token_id]) == 1 for matcher in matchers)
    assert num_masks > 50


def test_a_grammar_works_after_its_requests_have_used_up_the_states_of_a_lexer(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = functools.partial(LLParserLimits, max_lexer_states=500)
    monkeypatch.setattr(trivium.grammar, "LLParserLimits", limits)
    vocabulary = make_vocabulary()
    compiler = GrammarCompiler(vocabulary, (EOS,))
    params = StructuredOutputsParams(regex="|".join(f"{first}[x-z]{{0,900}}{first}" for first in "abcdefgh"))
    followed = [follow(compiler.compile(params), first + "x" * 100, vocabulary) for first in "abcdefghabcdefgh"]
    assert False in followed, "there were states enough for all"
    assert not any(first is second is False for first, second in itertools.pairwise([False, *followed]))


def follow(matcher: LLMatcher, text: str, vocabulary: GrammarVocabulary) -> bool:
    """Whether `matcher`, new, allows `text` byte by byte and what can come after it."""
    assert not matcher.is_error()
    mask = np.zeros(bitmask_width(len(vocabulary.tokens)), np.int32)
    for character in text:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error() or not matcher.try_consume_tokens([vocabulary.tokens.index(character.encode())]):
            return False
    return True
