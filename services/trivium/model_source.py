"""Where a model's files are: a local directory, a bundled model or the Hugging Face hub, in this order.

Knows names of files only; what is in them is the business of the executor and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trivium.errors import ConfigurationError


def find_model(source: str, revision: str | None, *, patterns: Sequence[str]) -> Path:
    """The directory with the files of `source`. A hub id is downloaded as far as `patterns` name its files.

    The hub client shows its own progress bar and keeps what it has. Raises ConfigurationError of one line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigurationError(f"model {source} is a file; expected a directory")
    bundled = _bundled(source)
    if bundled is not None:
        return bundled
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ConfigurationError(f"model directory {source} does not exist")
    return _download(source, revision, patterns)


def _bundled(name: str) -> Path | None:
    from trivium.demo import model_path

    path = model_path(name)
    if path is not None and not path.is_dir():
        raise ConfigurationError(f"the bundled model {name} is missing from this installation")
    return path


def _download(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(
            f"model {source} is neither a directory nor a bundled model, and the hub download failed: {reason}"
        ) from error
