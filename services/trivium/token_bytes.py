"""The bytes that a single token stands for: for token texts, and for grammars.

One token may be a part of a character, which no `decode` can show: so the bytes come from the vocabulary itself, read
as the tokenizer's decoder reads it.

    byte-level BPE   each character of a piece stands for one byte (GPT-2's table)
    sentencepiece    U+2581 is a space; a piece `<0xE4>` is a byte, where the decoder falls back to bytes
    ByT5             a piece is a character with the number of its byte
    others           what the tokenizer decodes the token to, alone
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]
ReadPiece = Callable[[str], bytes]

_SPACE = "\u2581"
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(backend: PreTrainedTokenizerBase, decode: Decode) -> Callable[[int], bytes]:
    """Token id -> its bytes, for ids that have a token. Added tokens are what they spell."""
    read = _piece_reader(backend)
    added = {token_id: token.content.encode() for token_id, token in backend.added_tokens_decoder.items()}

    def to_bytes(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        piece = backend.convert_ids_to_tokens(token_id) if read is not None else None
        if read is None or not isinstance(piece, str):
            return decode([token_id]).encode()
        return read(piece)

    return to_bytes


def piece_bytes(backend: PreTrainedTokenizerBase) -> Callable[[int], bytes] | None:
    """As `token_bytes`, for tokenizers whose text is the bytes of its tokens put together; None for others."""
    if _piece_reader(backend) is None:
        return None
    return token_bytes(backend, lambda token_ids: "")


def special_ids(backend: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are no text: control tokens and languages."""
    added = {token_id for token_id, token in backend.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(backend.all_special_ids, _language_ids(backend)))


def known_ids(backend: PreTrainedTokenizerBase) -> set[int]:
    """Ids that have a token: a model may have more outputs than its tokenizer has tokens."""
    vocabulary = backend.target_encoder if getattr(backend, "separate_vocabs", False) else backend.get_vocab()
    return {*vocabulary.values(), *backend.added_tokens_decoder, *_language_ids(backend)}


def _language_ids(backend: PreTrainedTokenizerBase) -> frozenset[int]:
    """Language tokens that M2M100 keeps outside its vocabulary."""
    return frozenset(getattr(backend, "lang_token_to_id", {}).values())


def _piece_reader(backend: PreTrainedTokenizerBase) -> ReadPiece | None:
    """How the tokenizer's own pieces are read, None if only decoding tells."""
    from transformers import ByT5Tokenizer, TokenizersBackend

    if isinstance(backend, ByT5Tokenizer):
        return lambda piece: bytes(map(ord, piece))
    if not isinstance(backend, TokenizersBackend):
        return _read_sentencepiece if hasattr(backend, "sp_model") or hasattr(backend, "spm_source") else None
    decoder = json.loads(backend.backend_tokenizer.to_str())["decoder"]
    steps = list(_steps(decoder or {}))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _read_byte_level
    if "ByteFallback" in kinds:
        return _read_byte_fallback
    replaces_space = any(step["type"] == "Replace" and step["pattern"] == {"String": _SPACE} for step in steps)
    return _read_sentencepiece if "Metaspace" in kinds or replaces_space else None


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _byte_table() -> dict[str, int]:
    """GPT-2's table: printable bytes are their own character, the others follow from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_table()


def _read_byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in piece)
    except KeyError:  # a piece outside the alphabet is text, as the decoder has it
        return piece.encode()


def _read_sentencepiece(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode()


def _read_byte_fallback(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _read_sentencepiece(piece)
