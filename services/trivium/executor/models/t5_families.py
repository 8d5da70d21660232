"""Families of the T5 graph: what each one's class in transformers fixes in code, and what its config.json sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.activations import activation_by_name
from trivium_kernels.activation import Activation

# Relative positions set no limit; `n_positions` says only what the model was trained with. This bounds what a request
# may ask for, and with it the arrays that are kept per request.
DEFAULT_MAX_LEN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Family:
    """per_layer_bias: every layer has position biases of its own, instead of the first layer's.

    scales_output: whether the decoder's output is multiplied by hidden_size ** -0.5; None: config.json says.
    defaults: of the config class, for keys that a config.json may leave out.
    """

    per_layer_bias: bool = False
    scales_output: bool | None = None
    feed_forward: str
    defaults: Mapping[str, int]


_MT5_DEFAULTS = {"vocab_size": 250112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}

T5 = T5Family(
    feed_forward="relu",
    defaults={"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
)
MT5 = T5Family(scales_output=False, feed_forward="gated-gelu", defaults=_MT5_DEFAULTS)
# transformers takes UMT5 for tied whatever its config.json says, and scales what is tied.
UMT5 = T5Family(per_layer_bias=True, scales_output=True, feed_forward="gated-gelu", defaults=_MT5_DEFAULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """max_distance: all distances from there on share one bias."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    ffn_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_buckets: int
    max_distance: int
    per_layer_bias: bool
    norm_eps: float
    activation: Activation
    gated: bool
    output_scale: float
    max_len: int

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim


def read_t5_config(config: JsonConfig, family: T5Family) -> T5Config:
    """Raises ConfigurationError, naming the key, for what the graph cannot run."""

    def positive(key: str) -> int:
        return config.positive_integer(key, family.defaults[key])

    num_layers, hidden_size = positive("num_layers"), positive("d_model")
    num_buckets, max_distance = _read_buckets(config)
    gated, activation = _read_feed_forward(config, family.feed_forward)
    scaled = family.scales_output
    if scaled is None:
        # Original T5 scales the output and ties it. Later checkpoints say which they are by `tie_word_embeddings`, and
        # by a key of its own since transformers 5.
        scaled = config.boolean("scale_decoder_outputs", config.boolean("tie_word_embeddings", True))
    return T5Config(
        vocab_size=positive("vocab_size"),
        hidden_size=hidden_size,
        head_dim=positive("d_kv"),
        num_heads=positive("num_heads"),
        ffn_size=positive("d_ff"),
        num_encoder_layers=num_layers,
        num_decoder_layers=config.positive_integer("num_decoder_layers", num_layers),
        num_buckets=num_buckets,
        max_distance=max_distance,
        per_layer_bias=family.per_layer_bias,
        norm_eps=config.number("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        output_scale=hidden_size**-0.5 if scaled else 1.0,
        max_len=max(config.integer("n_positions", 512), DEFAULT_MAX_LEN),
    )


def _read_buckets(config: JsonConfig) -> tuple[int, int]:
    """(number of buckets, distance of the last). Half of a decoder's buckets are for one distance each."""
    num_buckets = config.integer("relative_attention_num_buckets", 32)
    max_distance = config.integer("relative_attention_max_distance", 128)
    if num_buckets < 4:
        raise ConfigurationError(f"{config.file}: relative_attention_num_buckets must be at least 4, got {num_buckets}")
    if max_distance <= num_buckets // 2:
        raise ConfigurationError(
            f"{config.file}: relative_attention_max_distance must be more than half of "
            f"relative_attention_num_buckets {num_buckets}, got {max_distance}"
        )
    return num_buckets, max_distance


def _read_feed_forward(config: JsonConfig, default: str) -> tuple[bool, Activation]:
    """(gated, activation). `is_gated_act` and `dense_act_fn` win over `feed_forward_proj`, which says both."""
    projection = config.string("feed_forward_proj", default)
    gate, _, name = projection.rpartition("-")
    if gate not in ("", "gated"):
        raise ConfigurationError(f"{config.file}: feed_forward_proj {projection!r:.60} is not supported")
    if projection == "gated-gelu":
        name = "gelu_new"  # what the name has meant since T5 v1.1
    key = "feed_forward_proj" if config.values.get("dense_act_fn") is None else "dense_act_fn"
    activation = activation_by_name(config.string("dense_act_fn", name), config.file, key)
    return config.boolean("is_gated_act", gate == "gated"), activation
