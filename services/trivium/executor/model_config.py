"""Reading config.json and generation_config.json of a checkpoint, without importing transformers.

Owns the rule which file decides what. Every complaint is a ConfigurationError of one line that names file and key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class JsonConfig:
    """A JSON object with typed access. An absent key or a null takes the default; without a default it is an error."""

    values: Mapping[str, Any]
    file: str = CONFIG_FILE

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, default, int, "an integer"))

    def positive_integer(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise ConfigurationError(f"{self.file}: {key} must be at least 1, got {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, default, (int, float), "a number"))

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return bool(self._typed(key, default, bool, "true or false"))

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._typed(key, default, str, "a string"))

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """None for an explicit null, `default` for an absent key."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.integer(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; empty for null or an absent key."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise ConfigurationError(f"{self.file}: {key} must be a token id or a list of them, got {value!r:.60}")
        return tuple(dict.fromkeys(ids))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty for null or an absent key."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigurationError(f"{self.file}: {key} must be an object, got {value!r:.60}")
        return value or {}

    def _typed(self, key: str, default: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigurationError(f"{self.file}: {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigurationError(f"{self.file}: {key} must be {wanted}, got {value!r:.60}")
        return value


def read_json(path: Path) -> JsonConfig:
    """Read a JSON object. Raises ConfigurationError if the file is missing, unreadable or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path.parent} has no {path.name}: it is not a model directory") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return JsonConfig(values, file=path.name)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The token ids that generation depends on."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    decoder_start: int | None
    forced_bos: int | None
    forced_eos: int | None


def read_special_tokens(config: JsonConfig, generation: JsonConfig, class_defaults: Mapping[str, int]) -> SpecialTokens:
    """Special tokens of a checkpoint: `generation`, then config.json, then the architecture's defaults.

    generation: what generation_config.json says; `config` itself where there is none. As in transformers, it alone
    decides whether tokens are forced. Of several forced ids the lowest is taken: with all of them equally likely it is
    what greedy decoding picks.
    """
    model = JsonConfig({**class_defaults, **config.values}, file=config.file)
    if generation is config:
        generation = model

    def ids(key: str) -> tuple[int, ...]:
        return generation.token_ids(key) or model.token_ids(key)

    def lowest(values: tuple[int, ...]) -> int | None:
        return min(values, default=None)

    return SpecialTokens(
        eos=ids("eos_token_id"),
        bos=lowest(ids("bos_token_id")),
        pad=lowest(ids("pad_token_id")),
        decoder_start=lowest(ids("decoder_start_token_id")),
        forced_bos=lowest(generation.token_ids("forced_bos_token_id")),
        forced_eos=lowest(generation.token_ids("forced_eos_token_id")),
    )
