"""The older way to ask for structured output offline, as one argument of `LLM.generate`.

Owns the names of those options, and how they become `structured_outputs` of SamplingParams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trivium.errors import InvalidRequestError
from trivium.structured_outputs import StructuredOutputsParams

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMGuidedOptions:
    """What an output must look like: exactly one of the first five. The names are those of vLLM's `guided_*`.

    guided_json: a JSON schema, as text or dict. guided_json_object: any JSON object. guided_decoding_backend: None or
    "auto", since there is one.
    """

    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = self.kinds()
        if len(kinds) != 1:
            given = ", ".join(f"guided_{name}" for name in kinds) or "none"
            raise InvalidRequestError(
                f"guided_options_request takes exactly one of {', '.join(f'guided_{name}' for name in _KINDS)}, "
                f"got {given}",
                param="guided_options_request",
            )
        if self.guided_decoding_backend not in (None, "auto"):
            raise InvalidRequestError(
                f"guided_decoding_backend must be None or 'auto', got {self.guided_decoding_backend!r:.40}",
                param="guided_decoding_backend",
            )

    def kinds(self) -> dict[str, Any]:
        """The kinds that are set, without `guided_`."""
        values = {name: getattr(self, f"guided_{name}") for name in _KINDS}
        return {name: value for name, value in values.items() if value not in (None, False)}


GuidedDecodingRequest = LLMGuidedOptions


def guided_fields(options: LLMGuidedOptions) -> dict[str, Any]:
    """The fields of SamplingParams that ask for `options`. Raises InvalidRequestError."""
    if not isinstance(options, LLMGuidedOptions):
        raise InvalidRequestError(f"not LLMGuidedOptions: {options!r:.60}", param="guided_options_request")
    params = StructuredOutputsParams(**options.kinds(), whitespace_pattern=options.guided_whitespace_pattern)
    return {"structured_outputs": params}
