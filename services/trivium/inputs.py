"""What a caller may pass as a prompt, and what it becomes once every text in it has been tokenized.

Owns the prompt shapes of the public API (the same for REST, gRPC and offline use) and their validation. Knows no
tokenizer: `prompts.py` turns a `Prompt` into an `EncodedPrompt` with the help of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypeAlias, TypedDict, final

from trivium.embeds import PromptEmbeds
from trivium.errors import InvalidRequestError
from trivium.params import SamplingParams


@final
class TextPrompt(TypedDict):
    """A prompt as text; the tokenizer adds the model's special tokens.

    The languages are for multilingual encoder-decoder models: the model's own codes (`eng_Latn`), or others that name
    one of them (`en`, `en-US`).
    """

    prompt: str
    source_language: NotRequired[str | None]
    target_language: NotRequired[str | None]


@final
class TokensPrompt(TypedDict):
    """A prompt as token ids, used exactly as given. `prompt` is display text only."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    target_language: NotRequired[str | None]


@final
class EmbedsPrompt(TypedDict):
    """A prompt as embeddings, one row for each token: [num_tokens, hidden_size], what the model's own table would give.

    prompt_embeds: a torch tensor or a numpy array of float32, float16 or bfloat16.
    """

    prompt_embeds: Any
    target_language: NotRequired[str | None]


@final
class MixedPrompt(TypedDict):
    """A prompt in parts, in their order: text, token ids and embeddings. Text is tokenized without special tokens."""

    prompt_parts: list[str | TextPrompt | TokensPrompt | EmbedsPrompt]
    target_language: NotRequired[str | None]


SingletonPrompt: TypeAlias = str | TextPrompt | TokensPrompt | EmbedsPrompt | MixedPrompt


@final
class ExplicitEncoderDecoderPrompt(TypedDict):
    """Both sides of an encoder-decoder prompt; the sides may be of different kinds. Decoder `None` means empty.

    The languages are those of both sides, which name none themselves. decoder_start_token_id: instead of the model's.
    """

    encoder_prompt: SingletonPrompt
    decoder_prompt: SingletonPrompt | None
    source_language: NotRequired[str | None]
    target_language: NotRequired[str | None]
    decoder_start_token_id: NotRequired[int | None]


Prompt: TypeAlias = SingletonPrompt | ExplicitEncoderDecoderPrompt
PromptInputs: TypeAlias = Prompt  # older names of both
SingletonPromptInputs: TypeAlias = SingletonPrompt


MAX_PROMPT_PARTS = 256


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt in token ids.

    Where embeddings are given, in a prompt or an encoder input or in place of all of it, the ids are placeholders.

    For a decoder-only model `token_ids` is the prompt and `encoder_token_ids` is None. For an encoder-decoder model
    `token_ids` is the decoder prompt (it begins with the decoder start token). `text` and `encoder_text` are what the
    caller wrote, where it was text. forced_bos_token_id: what the target language demands as the first generated token.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    encoder_token_ids: tuple[int, ...] | None = None
    encoder_text: str | None = None
    forced_bos_token_id: int | None = None
    embeds: PromptEmbeds | None = None
    encoder_embeds: PromptEmbeds | None = None

    @property
    def num_embeds_bytes(self) -> int:
        return sum(len(embeds.data) for embeds in (self.embeds, self.encoder_embeds) if embeds is not None)

    @property
    def own_ids(self) -> tuple[int, ...]:
        """`token_ids` without placeholders."""
        return tuple(token_id for token_id, is_own in zip(self.token_ids, self.is_token, strict=True) if is_own)

    @property
    def is_token(self) -> list[bool]:
        """Of each of `token_ids`, whether it is one, and no placeholder."""
        found = [True] * len(self.token_ids)
        for start, end in () if self.embeds is None else self.embeds.spans:
            found[start:end] = [False] * (end - start)
        return found


@dataclass(frozen=True, slots=True)
class PairTexts:
    """What a tokenizer has to encode of an encoder-decoder prompt; None where a side is no text."""

    encoder: str | None = None
    decoder: str | None = None
    source_language: str | None = None
    target_language: str | None = None

    @property
    def is_empty(self) -> bool:
        return self == PairTexts()


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of `PairTexts`, and how the family of the model is told the target language.

    decoder_prefix: ids between the start token and the decoder's text. decoder_start_token_id: instead of the model's.
    forced_bos_token_id: the first generated token. needs_target_language: the model has many and none was named, here
    or in the text.
    """

    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    decoder_prefix: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    needs_target_language: bool = False


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """What a client already holds of one choice: generation goes on after it, and nothing of it is sent again.

    That includes log-probabilities: of its tokens, and of the prompt if it is choice 0 and anything of it was sent.

    `output_token_ids` are output, not prompt: limits, seeds and usage count them. `emitted_chars` is the length of the
    text that was delivered. A `finished` choice is complete: nothing is generated for it.
    """

    index: int
    output_token_ids: tuple[int, ...]
    emitted_chars: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request as the engine takes it: token ids in, `sampling.n` choices out.

    `stream` asks for updates while the request runs; without it one update per choice arrives, when it is finished.
    `sampling.seed` must be set (the front door draws one where the caller gave none): a request that is resumed after
    a crash then continues with the same random numbers.
    Waiting requests are ordered by `priority` (lower first), then fairly among tenants. Cached prefixes are shared only
    between requests of the same `cache_salt`. adapter: the name of a loaded LoRA adapter, prompt_adapter: that of a
    loaded soft prompt, whose virtual tokens are not part of `prompt`; empty for none.
    """

    request_id: str
    prompt: EncodedPrompt
    sampling: SamplingParams
    stream: bool = False
    resume: tuple[ResumedChoice, ...] = ()
    traceparent: str = ""
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    prompt_adapter: str = ""

    @property
    def num_open_choices(self) -> int:
        """Choices that will get a last delta: all but those that the caller holds whole."""
        return self.sampling.n - len({choice.index for choice in self.resume if choice.finished})


_SIDES = frozenset({"encoder_prompt", "decoder_prompt"})
_LANGUAGES = frozenset({"source_language", "target_language"})
_EXPLICIT_KEYS = _SIDES | _LANGUAGES | {"decoder_start_token_id"}
_TEXT_KEYS = frozenset({"prompt", "prompt_token_ids"})


def is_explicit_encoder_decoder(prompt: object) -> bool:
    """True if `prompt` names an encoder or a decoder side."""
    return isinstance(prompt, dict) and not _SIDES.isdisjoint(prompt)


def prompt_languages(prompt: Prompt) -> tuple[str | None, str | None]:
    """Source and target language that `prompt`, whose shape was checked, names."""
    if isinstance(prompt, str):
        return None, None
    languages = tuple(prompt.get(name) for name in ("source_language", "target_language"))
    for side in ("encoder_prompt", "decoder_prompt"):
        part = prompt.get(side)
        if isinstance(part, dict) and (part.get("source_language") or part.get("target_language")):
            raise InvalidRequestError(f"{side} must not name languages: the pair does", param=side)
    for name, language in zip(("source_language", "target_language"), languages, strict=True):
        if language is not None and not isinstance(language, str):
            raise InvalidRequestError(f"{name} must be a language code, got {language!r:.40}", param=name)
    return languages  # type: ignore[return-value]


def split_prompt(prompt: object) -> tuple[SingletonPrompt, SingletonPrompt | None, bool]:
    """Check the shape of `prompt` and return (main or encoder side, decoder side, whether the pair was explicit).

    Raises InvalidRequestError that names the part that is wrong.
    """
    if not is_explicit_encoder_decoder(prompt):
        return check_singleton(prompt, "prompt"), None, False
    assert isinstance(prompt, dict)
    unknown = set(prompt) - _EXPLICIT_KEYS
    if unknown:
        raise InvalidRequestError(f"unknown keys in prompt: {sorted(unknown)}", param="prompt", code="invalid_prompt")
    if "encoder_prompt" not in prompt:
        raise InvalidRequestError("encoder_prompt is missing", param="encoder_prompt", code="missing_prompt")
    encoder = check_singleton(prompt["encoder_prompt"], "encoder_prompt")
    decoder = prompt.get("decoder_prompt")
    return encoder, None if decoder is None else check_singleton(decoder, "decoder_prompt"), True


def check_singleton(prompt: object, param: str) -> SingletonPrompt:
    """Return `prompt` if it is one of the singleton prompts, else raise InvalidRequestError naming `param`.

    What embeddings are made of is checked later: it takes more than the standard library.
    """
    if isinstance(prompt, str):
        return _check_text(prompt, param)
    if isinstance(prompt, dict):
        if is_explicit_encoder_decoder(prompt):
            raise InvalidRequestError(
                f"{param} must not be an encoder/decoder pair itself", param=param, code="invalid_prompt"
            )
        _check_keys(prompt, param)
        if "prompt_parts" in prompt:
            return _check_parts(prompt, param)
        if "prompt_embeds" in prompt:
            if prompt.get("prompt") is not None or "prompt_token_ids" in prompt:
                raise InvalidRequestError(
                    "prompt_embeds takes the place of text and token ids: give one of them",
                    param=param,
                    code="conflicting_parameters",
                )
            return EmbedsPrompt(prompt_embeds=prompt["prompt_embeds"])
        if "prompt_token_ids" in prompt:
            ids = check_token_ids(prompt["prompt_token_ids"], param)
            text = prompt.get("prompt")
            return (
                TokensPrompt(prompt_token_ids=ids)
                if text is None
                else TokensPrompt(prompt_token_ids=ids, prompt=_check_text(text, param))
            )
        if "prompt" in prompt:
            return TextPrompt(prompt=_check_text(prompt["prompt"], param))
    raise InvalidRequestError(
        f"{param} must be text, TextPrompt {{prompt}}, TokensPrompt {{prompt_token_ids}}, "
        "EmbedsPrompt {prompt_embeds}, MixedPrompt {prompt_parts} or ExplicitEncoderDecoderPrompt {encoder_prompt, "
        "decoder_prompt}, "
        f"not {type(prompt).__name__}",
        param=param,
        code="invalid_prompt",
    )


def _check_parts(prompt: dict[str, Any], param: str) -> MixedPrompt:
    parts = prompt["prompt_parts"]
    if not isinstance(parts, (list, tuple)) or not 1 <= len(parts) <= MAX_PROMPT_PARTS:
        raise InvalidRequestError(
            f"{param}: prompt_parts must be a list of 1 to {MAX_PROMPT_PARTS} prompts",
            param=param,
            code="invalid_prompt",
        )
    for index, part in enumerate(parts):
        if isinstance(part, dict) and "prompt_parts" in part:
            raise InvalidRequestError(
                f"{param}[{index}] must not have parts itself", param=param, code="invalid_prompt"
            )
    checked: list[Any] = [check_singleton(part, f"{param}[{index}]") for index, part in enumerate(parts)]
    return MixedPrompt(prompt_parts=checked)


def _check_keys(prompt: dict[str, Any], param: str) -> None:
    """Raise InvalidRequestError for what no prompt of this kind has, such as images."""
    known = next((frozenset({name}) for name in ("prompt_parts", "prompt_embeds") if name in prompt), _TEXT_KEYS)
    if "prompt_embeds" in prompt:
        known |= _TEXT_KEYS  # which have an error of their own
    unknown = [name for name, value in prompt.items() if value is not None and name not in known | _LANGUAGES]
    if unknown:
        raise InvalidRequestError(
            f"unknown keys in {param}: {', '.join(map(str, unknown)):.200}", param=param, code="invalid_prompt"
        )


def check_token_ids(ids: object, param: str) -> list[int]:
    """Return `ids` as a list of non-negative ints; the upper bound is the model's and is checked at admission."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise InvalidRequestError(f"{param} must be a list of token ids", param=param, code="invalid_token_id")
    out: list[int] = []
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise InvalidRequestError(
                f"{param}[{position}] is not a token id: {token_id!r:.40}",
                param=f"{param}[{position}]",
                code="invalid_token_id",
            )
        out.append(token_id)
    return out


def _check_text(text: object, param: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"{param} must be text, not {type(text).__name__}", param=param, code="invalid_prompt"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate, which is not a character", param=param, code="invalid_unicode"
        ) from None
    return text


def zip_enc_dec_prompt_lists(
    encoder_prompts: Sequence[SingletonPrompt], decoder_prompts: Sequence[SingletonPrompt | None]
) -> list[ExplicitEncoderDecoderPrompt]:
    """Pair encoder prompts with decoder prompts, one to one.

    Raises InvalidRequestError if the lists differ in length.
    """
    if len(encoder_prompts) != len(decoder_prompts):
        raise InvalidRequestError(
            f"{len(encoder_prompts)} encoder prompts but {len(decoder_prompts)} decoder prompts",
            param="decoder_prompts",
        )
    return [
        ExplicitEncoderDecoderPrompt(encoder_prompt=encoder, decoder_prompt=decoder)
        for encoder, decoder in zip(encoder_prompts, decoder_prompts, strict=True)
    ]


zip_enc_dec_prompts = zip_enc_dec_prompt_lists


def build_explicit_enc_dec_prompt(
    encoder_prompt: SingletonPrompt, decoder_prompt: SingletonPrompt | None = None
) -> ExplicitEncoderDecoderPrompt:
    """One pair."""
    return ExplicitEncoderDecoderPrompt(encoder_prompt=encoder_prompt, decoder_prompt=decoder_prompt)


def to_enc_dec_tuple_list(
    enc_dec_prompts: Iterable[ExplicitEncoderDecoderPrompt],
) -> list[tuple[SingletonPrompt, SingletonPrompt | None]]:
    """(encoder prompt, decoder prompt) of each pair: what `zip_enc_dec_prompt_lists` was given, side by side."""
    return [(pair["encoder_prompt"], pair["decoder_prompt"]) for pair in enc_dec_prompts]
