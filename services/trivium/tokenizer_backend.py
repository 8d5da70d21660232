"""Loading a tokenizer with transformers, without remote code; for the tokenizer service and for grammars.

transformers is imported on first use, so that importing this module costs nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.errors import ConfigurationError
from trivium.model_source import find_model
from trivium.tokenizer_files import TOKENIZER_FILES, has_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_backend(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory, a bundled model or a hub id.

    Raises ConfigurationError, in one line, if there are no tokenizer files or transformers cannot read them.
    """
    path = find_model(source, revision, patterns=TOKENIZER_FILES)
    try:
        backend: PreTrainedTokenizerBase = _tokenizer_class(path).from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the files made it stumble over
        reason = str(error).strip().partition("\n")[0] if has_vocabulary(path) else "there are no tokenizer files"
        raise ConfigurationError(f"cannot load the tokenizer of {source}: {reason}") from error
    # Without its files a class makes up a vocabulary of a few tokens; only ByT5's needs none.
    if type(backend).vocab_files_names and not has_vocabulary(path):
        raise ConfigurationError(f"cannot load the tokenizer of {source}: there are no tokenizer files")
    return backend


def _tokenizer_class(path: Path) -> Any:
    """transformers' choice, but for UMT5 without a tokenizer.json, which it cannot load: that is T5's tokenizer."""
    from transformers import AutoTokenizer, T5Tokenizer

    config = path / "config.json"
    if not (path / "spiece.model").exists() or (path / "tokenizer.json").exists() or not config.exists():
        return AutoTokenizer
    return T5Tokenizer if json.loads(config.read_text()).get("model_type") == "umt5" else AutoTokenizer
