"""Families of the BART graph: what each one's class in transformers fixes in code, and what its config.json sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import read_activation
from trivium_kernels.activation import Activation


class Positions(StrEnum):
    """learned, of the checkpoint; sinusoidal, of the checkpoint or computed; padded_sinusoidal, always computed.

    See `positions` for the two ways of computing them.
    """

    LEARNED = "learned"
    SINUSOIDAL = "sinusoidal"
    PADDED_SINUSOIDAL = "padded_sinusoidal"


class EmbeddingNorm(StrEnum):
    """Which embeddings are normed: none; the sums of tokens and positions; in the decoder its unscaled tokens alone."""

    NONE = "none"
    SUM = "sum"
    DECODER_TOKENS = "decoder_tokens"


_BART_DEFAULTS: Mapping[str, int] = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BartFamily:
    """pre_norm: a norm before each block and one after the last, instead of one after each block.

    position_offset: position p is row p + offset of the learned table. has_logits_bias: a stored `final_logits_bias` is
    added to the logits. may_separate: `share_encoder_decoder_embeddings` can be false. defaults: of the config class,
    for keys that a config.json may leave out, where they differ from BART's. table_is_scaled: the scale of
    `scale_embedding` is applied by the embedding module, not by encoder and decoder behind it.
    """

    pre_norm: bool
    positions: Positions
    position_offset: int = 0
    embedding_norm: EmbeddingNorm = EmbeddingNorm.NONE
    has_logits_bias: bool = True
    may_separate: bool = False
    activation: str = "gelu"
    scale_embedding: bool = False
    table_is_scaled: bool = True
    defaults: Mapping[str, int] = field(default_factory=dict)


BART = BartFamily(pre_norm=False, positions=Positions.LEARNED, position_offset=2, embedding_norm=EmbeddingNorm.SUM)
MBART = BartFamily(pre_norm=True, positions=Positions.LEARNED, position_offset=2, embedding_norm=EmbeddingNorm.SUM)
MARIAN = BartFamily(
    pre_norm=False,
    positions=Positions.SINUSOIDAL,
    may_separate=True,
    table_is_scaled=False,
    defaults={"vocab_size": 58101},
)
PEGASUS = BartFamily(pre_norm=True, positions=Positions.SINUSOIDAL, table_is_scaled=False)
M2M100 = BartFamily(
    pre_norm=True,
    positions=Positions.PADDED_SINUSOIDAL,
    has_logits_bias=False,
    activation="relu",
    scale_embedding=True,
    defaults={"vocab_size": 128112},
)
BLENDERBOT = BartFamily(
    pre_norm=True,
    positions=Positions.LEARNED,
    defaults={
        "vocab_size": 8008,
        "max_position_embeddings": 128,
        "d_model": 2560,
        "encoder_layers": 2,
        "decoder_layers": 24,
        "encoder_attention_heads": 32,
        "decoder_attention_heads": 32,
        "encoder_ffn_dim": 10240,
        "decoder_ffn_dim": 10240,
    },
)
BLENDERBOT_SMALL = BartFamily(
    pre_norm=False,
    positions=Positions.LEARNED,
    embedding_norm=EmbeddingNorm.DECODER_TOKENS,
    table_is_scaled=False,
    defaults={
        "max_position_embeddings": 512,
        "d_model": 512,
        "encoder_layers": 8,
        "decoder_layers": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """One side, encoder or decoder. prefix: where its tensors are. padding_id: only where positions depend on it."""

    prefix: str
    is_decoder: bool
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    max_positions: int
    padding_id: int | None
    scale_embedding: bool
    activation: Activation
    family: BartFamily

    @property
    def norms_tokens(self) -> bool:
        """Whether positions are added only after the norm."""
        return self.is_decoder and self.family.embedding_norm is EmbeddingNorm.DECODER_TOKENS

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.scale_embedding and not self.norms_tokens else 1.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class BartConfig:
    """shared: one vocabulary for both sides. tied: logits are products with the decoder's token embeddings."""

    encoder: StackConfig
    decoder: StackConfig
    encoder_vocab_size: int
    decoder_vocab_size: int
    shared: bool
    tied: bool


def read_bart_config(config: JsonConfig, family: BartFamily) -> BartConfig:
    """Raises ConfigurationError, naming the key, for what the graph cannot run."""
    vocab_size = _positive(config, family, "vocab_size")
    shared = not family.may_separate or config.boolean("share_encoder_decoder_embeddings", True)
    return BartConfig(
        encoder=_read_stack(config, family, "encoder"),
        decoder=_read_stack(config, family, "decoder"),
        encoder_vocab_size=vocab_size,
        decoder_vocab_size=vocab_size if shared else config.positive_integer("decoder_vocab_size", vocab_size),
        shared=shared,
        tied=config.boolean("tie_word_embeddings", True),
    )


def _read_stack(config: JsonConfig, family: BartFamily, side: str) -> StackConfig:
    hidden_size = _positive(config, family, "d_model")
    num_heads = _positive(config, family, f"{side}_attention_heads")
    if hidden_size % num_heads:
        raise ConfigurationError(
            f"{config.file}: d_model {hidden_size} is not a multiple of {side}_attention_heads {num_heads}"
        )
    has_padding = family.positions is Positions.PADDED_SINUSOIDAL
    return StackConfig(
        prefix=f"model.{side}",
        is_decoder=side == "decoder",
        hidden_size=hidden_size,
        num_layers=_positive(config, family, f"{side}_layers"),
        num_heads=num_heads,
        ffn_size=_positive(config, family, f"{side}_ffn_dim"),
        max_positions=_positive(config, family, "max_position_embeddings"),
        padding_id=_read_padding_id(config) if has_padding else None,
        scale_embedding=config.boolean("scale_embedding", family.scale_embedding),
        activation=read_activation(config, "activation_function", family.activation),
        family=family,
    )


def _read_padding_id(config: JsonConfig) -> int:
    padding_id = config.integer("pad_token_id", 1)
    if padding_id < 0:
        raise ConfigurationError(f"{config.file}: pad_token_id {padding_id} is negative; positions are counted from it")
    return padding_id


def _positive(config: JsonConfig, family: BartFamily, key: str) -> int:
    return config.positive_integer(key, family.defaults.get(key, _BART_DEFAULTS[key]))
