"""Vectors instead of text: which of a model's hidden states, and how they become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trivium.config import ModelInfo
from trivium.errors import ContextLengthError, InvalidRequestError


class PoolingType(StrEnum):
    """ALL keeps the vector of every token."""

    LAST = "last"
    MEAN = "mean"
    CLS = "cls"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How a prompt becomes a vector.

    pooling_type: "last" (token), "mean", "cls" (first token) or "all"; None is "last" for a decoder-only model and
    "mean", of the encoder's output, for an encoder-decoder model. normalize: to length 1. truncate_prompt_tokens: as
    in SamplingParams.
    """

    pooling_type: str | None = None
    normalize: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.pooling_type not in (None, *PoolingType):
            raise InvalidRequestError(
                f"pooling_type must be one of {', '.join(PoolingType)}, got {self.pooling_type!r:.40}",
                param="pooling_type",
            )
        if not isinstance(self.normalize, bool):
            raise InvalidRequestError(f"normalize must be true or false, got {self.normalize!r:.40}", param="normalize")

    def resolve(self, *, is_encoder_decoder: bool) -> PoolingType:
        if self.pooling_type is not None:
            return PoolingType(self.pooling_type)
        return PoolingType.MEAN if is_encoder_decoder else PoolingType.LAST


def check_embed(prompts: Sequence[Sequence[int]], params: PoolingParams, info: ModelInfo) -> None:
    """Raise InvalidRequestError unless model `info` can make one vector of each prompt, in one pass."""
    if params.pooling_type == PoolingType.ALL:
        raise InvalidRequestError("pooling_type 'all' is for offline use", param="pooling_type")
    if not prompts:
        raise InvalidRequestError("there is no prompt", param="prompts", code="missing_prompt")
    for index, prompt in enumerate(prompts):
        check_pooled_length(len(prompt), info, f"prompts[{index}]")
        if max(prompt) >= info.vocab_size or min(prompt) < 0:
            raise InvalidRequestError(
                f"prompts[{index}] has ids outside the vocabulary of {info.vocab_size} tokens",
                param=f"prompts[{index}]",
                code="invalid_token_id",
            )
    num_tokens = sum(map(len, prompts))
    if len(prompts) > 1 and num_tokens > info.max_num_batched_tokens:
        raise InvalidRequestError(
            f"the prompts have {num_tokens} tokens together, at most {info.max_num_batched_tokens} are taken",
            param="prompts",
        )


def check_pooled_length(num_tokens: int, info: ModelInfo, param: str) -> None:
    """Raise InvalidRequestError or ContextLengthError unless the model (its encoder) reads so many tokens."""
    limit = info.max_encoder_len if info.is_encoder_decoder else info.max_model_len
    if not num_tokens:
        raise InvalidRequestError(f"{param} is empty", param=param, code="empty_prompt")
    if num_tokens > limit:
        raise ContextLengthError(f"{param} has {num_tokens} tokens, the model takes {limit}", param=param)


def packs(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """`prompts` in their order, as many at a time as have `max_tokens` together; a longer one is alone."""
    pack: list[tuple[int, ...]] = []
    for prompt in prompts:
        if pack and sum(map(len, pack)) + len(prompt) > max_tokens:
            yield pack
            pack = []
        pack.append(prompt)
    if pack:
        yield pack
