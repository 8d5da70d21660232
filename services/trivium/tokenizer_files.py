"""The files of a tokenizer, by name. Knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

# Names as transformers' tokenizers save them; weights match neither list.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tekken.json",
    "vocab*",
    "*vocab.json",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def has_vocabulary(directory: Path) -> bool:
    """True if `directory` holds a file that can say what the tokens are."""
    return any(next(directory.glob(pattern), None) for pattern in VOCABULARY_FILES)
