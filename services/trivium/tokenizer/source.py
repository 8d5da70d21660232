"""Where the files of a tokenizer come from: a local directory, a bundled model or the Hugging Face hub.

Knows file names only, not what is in the files.
"""

from __future__ import annotations

from pathlib import Path

from trivium.errors import ConfigurationError

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


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The local directory that holds the tokenizer of `source`; downloads its files if `source` is a hub id.

    Raises ConfigurationError, in one line, if there is no such directory, model or repository.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    bundled = _bundled(source)
    if bundled is not None:
        return bundled
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigurationError(f"there is no model directory {source}")
    return _download(source, revision)


def has_vocabulary(directory: Path) -> bool:
    """True if `directory` holds a file that can say what the tokens are."""
    return any(next(directory.glob(pattern), None) for pattern in VOCABULARY_FILES)


def _bundled(source: str) -> Path | None:
    from trivium.demo import model_path

    return model_path(source)


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except HFValidationError:
        raise ConfigurationError(f"{source!r} is neither a directory, a bundled model nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"cannot get the tokenizer of {source} from the hub ({type(error).__name__}); "
            "give a local directory, or check the name and the connection"
        ) from error
