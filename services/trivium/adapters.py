"""Adapters that a request of an offline program brings with it."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter to generate with: a directory (or hub id) as PEFT writes it, under a name and a number of its own."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        _check_text("lora_name", self.lora_name)
        _check_text("lora_path", self.lora_path)
        _check_number("lora_int_id", self.lora_int_id)


@dataclass(frozen=True, slots=True)
class PromptAdapterRequest:
    """A soft prompt to generate with: as LoRARequest, and how many virtual tokens it has."""

    prompt_adapter_name: str
    prompt_adapter_id: int
    prompt_adapter_local_path: str
    prompt_adapter_num_virtual_tokens: int

    def __post_init__(self) -> None:
        _check_text("prompt_adapter_name", self.prompt_adapter_name)
        _check_text("prompt_adapter_local_path", self.prompt_adapter_local_path)
        _check_number("prompt_adapter_id", self.prompt_adapter_id)
        _check_number("prompt_adapter_num_virtual_tokens", self.prompt_adapter_num_virtual_tokens)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} must be a name, got {value!r:.60}", param=name)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"{name} must be at least 1, got {value!r:.60}", param=name)
