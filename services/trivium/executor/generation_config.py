"""Reading generation_config.json: what the checkpoint wants of requests that leave something unset.

As in transformers, a checkpoint without that file has these keys in its config.json, and one with it only there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.config import GenerationDefaults, ModelInfo
from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor.model_config import GENERATION_CONFIG_FILE, JsonConfig, read_json
from trivium.generation_defaults import default_sampling_params
from trivium.params import MAX_BAD_WORDS, MAX_TOKEN_IDS

AUTO = "auto"
NONE = "none"

_INTEGERS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "top_k",
)
_NUMBERS = (
    "length_penalty",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
)


def read_generation_config(choice: str, directory: Path, config: JsonConfig) -> JsonConfig:
    """The generation settings of the checkpoint in `directory`.

    choice: "auto" for its own, "none" for none at all, or the path of another file or of a directory with one. Raises
    ConfigurationError.
    """
    if choice == NONE:
        return JsonConfig({}, file=GENERATION_CONFIG_FILE)
    if choice == AUTO:
        path = directory / GENERATION_CONFIG_FILE
        return read_json(path) if path.exists() else config
    path = Path(choice).expanduser()
    path = path / GENERATION_CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise ConfigurationError(f"--generation-config must be auto, none or a file or directory, got {choice!r:.200}")
    return read_json(path)


def read_generation_defaults(generation: JsonConfig, eos_token_ids: tuple[int, ...]) -> GenerationDefaults:
    """Raises ConfigurationError for a value of the wrong type. Banning EOS alone has no effect in transformers."""
    values: dict[str, Any] = {name: generation.optional_integer(name) for name in _INTEGERS}
    for name, value in values.items():
        if value is not None and not 0 <= value < 2**31:
            raise ConfigurationError(f"{generation.file}: {name} must not be negative or huge, got {value}")
    values |= {name: _optional_number(generation, name) for name in _NUMBERS}
    bad_words = _token_sequences(generation, "bad_words_ids")
    return GenerationDefaults(
        **values,
        do_sample=None if generation.values.get("do_sample") is None else generation.boolean("do_sample"),
        early_stopping=_early_stopping(generation),
        suppress_tokens=_few(generation.token_ids("suppress_tokens"), "suppress_tokens", MAX_TOKEN_IDS),
        begin_suppress_tokens=_few(
            generation.token_ids("begin_suppress_tokens"), "begin_suppress_tokens", MAX_TOKEN_IDS
        ),
        bad_words_ids=_few(
            tuple(ids for ids in bad_words if ids not in {(eos,) for eos in eos_token_ids}),
            "bad_words_ids",
            MAX_BAD_WORDS,
        ),
    )


def check_generation_defaults(info: ModelInfo) -> None:
    """Raise ConfigurationError if the defaults of `info` would make every request fail."""
    defaults = info.generation_defaults
    try:
        default_sampling_params(info)
    except InvalidRequestError as error:
        raise ConfigurationError(
            f"{GENERATION_CONFIG_FILE}: {error.message}; --generation-config=none ignores the file"
        ) from None
    for ids in (defaults.suppress_tokens, defaults.begin_suppress_tokens, *defaults.bad_words_ids):
        if any(token_id >= info.vocab_size for token_id in ids):
            raise ConfigurationError(
                f"{GENERATION_CONFIG_FILE} bans token {max(ids)}, the vocabulary has {info.vocab_size} tokens"
            )


def _optional_number(generation: JsonConfig, name: str) -> float | None:
    return None if generation.values.get(name) is None else generation.number(name)


def _early_stopping(generation: JsonConfig) -> bool | str | None:
    value = generation.values.get("early_stopping")
    if value is None or isinstance(value, bool) or value == "never":
        return value
    raise ConfigurationError(f"{generation.file}: early_stopping must be true, false or 'never', got {value!r:.60}")


def _token_sequences(generation: JsonConfig, name: str) -> tuple[tuple[int, ...], ...]:
    value = generation.values.get(name) or []
    if not isinstance(value, list) or any(not isinstance(ids, list) or not ids for ids in value):
        raise ConfigurationError(f"{generation.file}: {name} must be a list of lists of token ids, got {value!r:.60}")
    for ids in value:
        JsonConfig({name: ids}, file=generation.file).token_ids(name)
    return tuple(dict.fromkeys(tuple(ids) for ids in value))


def _few(items: tuple, name: str, limit: int) -> tuple:  # type: ignore[type-arg]
    if len(items) > limit:
        raise ConfigurationError(
            f"{GENERATION_CONFIG_FILE}: {name} has {len(items)} entries, at most {limit} are taken"
        )
    return items
