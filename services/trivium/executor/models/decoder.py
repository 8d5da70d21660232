"""The decoder-only graph: attention and feed-forward blocks on a residual stream, over packed tokens.

Which family it is, `decoder_families` and `older_decoder_families` say, in a `DecoderConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.linear import Linear, Product
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.decoder_config import BlockNames, DecoderConfig, LayerConfig, QkvLayout
from trivium.executor.models.feed_forward import FeedForward, load_feed_forward
from trivium.executor.models.model import InputEmbeds, LanguageModel
from trivium.executor.models.norms import Norm, RmsNorm, load_head_norm, load_norm
from trivium.executor.models.rope import RotaryAngles
from trivium.executor.parallel.shard import Embedding, Shard, Split
from trivium_kernels.dispatch import Kernels
from trivium_kernels.paged_attention import PagedAttentionPlan
from trivium_kernels.rotate_and_cache import HeadNorms


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """What a block sees, puts out and leaves behind is normed by these; None where it is not."""

    enter: Norm | None
    update: Norm | None
    leave: Norm | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer.

    head_norms: those of queries and keys as the op wants them that also rotates and writes to the cache.
    rotates_at_once: whether that op does all that is done to queries and keys.
    """

    config: LayerConfig
    attention_norms: BlockNorms
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    head_norms: HeadNorms | None
    rotates_at_once: bool
    output: Product
    mlp_norms: BlockNorms
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share. rotations: (cos, signed sin) of each of the model's rotaries.

    plans: window -> how attention runs. last, last_plan: the tokens that the last layer goes on with, if these are not
    all, once it has written the keys and values of all, and how their attention runs.
    """

    kv_cache: KVCache
    slot_mapping: Tensor
    rotations: tuple[tuple[Tensor, Tensor], ...]
    plans: dict[int | None, PagedAttentionPlan]
    last: Tensor | None
    last_plan: PagedAttentionPlan | None


class Decoder:
    """Weights only, immutable after construction: those of one rank, whose heads are all that it knows of."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels) -> None:
        names, hidden = config.names, config.hidden_size
        self._config = own_heads(config, checkpoint.shard)
        self._kernels = kernels
        self._rotaries = tuple(RotaryAngles(rotary, checkpoint.device) for rotary in config.rotaries)
        self._embedding, self._head = _load_vocabulary(config, checkpoint)
        self._positions: Tensor | None = None
        if names.positions is not None:
            num_rows = config.max_positions + config.position_offset
            self._positions = checkpoint.tensor(f"{names.prefix}.{names.positions}.weight", num_rows, hidden)
        self._project_in = _load_projection(checkpoint, config, names.project_in, hidden, config.embedding_size)
        self._project_out = _load_projection(checkpoint, config, names.project_out, config.embedding_size, hidden)
        self._layers = tuple(_load_layer(config, checkpoint, kernels, index) for index in range(len(config.layers)))
        self._final_norm: Norm | None = None
        if names.final_norm is not None:
            self._final_norm = load_norm(config, checkpoint, kernels, f"{names.prefix}.{names.final_norm}", hidden)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        embeds: InputEmbeds | None = None,
    ) -> Tensor:
        step = self._plan_step(positions, kv_cache, metadata)
        run_layer = self._run_parallel_layer if self._config.parallel else self._run_layer
        hidden = self._embed(token_ids, positions, embeds)
        for index, layer in enumerate(self._layers):
            hidden = run_layer(index, layer, hidden, step)
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        return hidden if self._project_out is None else self._project_out(hidden)

    def _plan_step(self, positions: Tensor, kv_cache: KVCache, metadata: AttentionMetadata) -> Step:
        kernels, block_size, last = self._kernels, kv_cache.block_size, metadata.last
        windows = {layer.window for layer in self._config.layers}
        last_plan: PagedAttentionPlan | None = None
        if last is not None:
            window = self._config.layers[-1].window
            last_plan = metadata.of_last(last).plan_self(kernels, block_size, window=window)
        return Step(
            kv_cache,
            metadata.slot_mapping,
            tuple(rotary.cos_sin(positions, metadata.max_model_len) for rotary in self._rotaries),
            {window: metadata.plan_self(kernels, block_size, window=window) for window in windows},
            None if last is None else last.tokens,
            last_plan,
        )

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        if self._config.logit_divisor != 1.0:
            logits = logits / self._config.logit_divisor
        cap = self._config.logit_soft_cap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def _embed(self, token_ids: Tensor, positions: Tensor, embeds: InputEmbeds | None) -> Tensor:
        """[num_tokens, hidden]. As in transformers, a family's `embeds` are multiplied already, or not yet."""
        hidden = self._embedding(token_ids)
        if embeds is not None and not self._config.embeds_are_multiplied:
            hidden = embeds.put_into(hidden)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if self._config.embedding_multiplier != 1.0:
            hidden = hidden * self._config.embedding_multiplier
        if embeds is not None and self._config.embeds_are_multiplied:
            hidden = embeds.put_into(hidden)
        if self._positions is not None:
            hidden = hidden + F.embedding(positions + self._config.position_offset, self._positions)
        return hidden

    def _run_layer(self, index: int, layer: DecoderLayer, hidden: Tensor, step: Step) -> Tensor:
        kept = self._kept(index, step)
        attend = partial(self._attend, index, layer, step)
        hidden = self._run_block(hidden, layer.attention_norms, attend, kept)
        return self._run_block(hidden, layer.mlp_norms, layer.mlp)

    def _run_parallel_layer(self, index: int, layer: DecoderLayer, hidden: Tensor, step: Step) -> Tensor:
        kept = self._kept(index, step)
        seen, hidden = _normed(hidden, layer.attention_norms.enter), _rows(hidden, kept)
        attended = self._attend(index, layer, step, seen, hidden)
        seen = _rows(seen, kept) if layer.mlp_norms.enter is None else layer.mlp_norms.enter(hidden)
        return layer.mlp(seen, attended)

    def _kept(self, index: int, step: Step) -> Tensor | None:
        """The tokens that layer `index` goes on with; None for all."""
        return step.last if index == len(self._layers) - 1 else None

    def _run_block(
        self,
        hidden: Tensor,
        norms: BlockNorms,
        block: Callable[[Tensor, Tensor | None], Tensor],
        kept: Tensor | None = None,
    ) -> Tensor:
        """The stream after `block`, which adds to it by itself where nothing is done to what it puts out.

        kept: the tokens that it puts something out for; None for all.
        """
        x, hidden = _normed(hidden, norms.enter), _rows(hidden, kept)
        if norms.update is None and self._config.residual_multiplier == 1.0:
            return _normed(block(x, hidden), norms.leave)
        update = _normed(block(x, None), norms.update)
        if self._config.residual_multiplier != 1.0:
            update = update * self._config.residual_multiplier
        return _normed(hidden + update, norms.leave)

    def _attend(self, index: int, layer: DecoderLayer, step: Step, x: Tensor, add: Tensor | None) -> Tensor:
        """What attention puts out for the tokens that the layer goes on with, having written keys and values of all."""
        config = layer.config
        qkv = layer.qkv(x).view(len(x), self._config.num_heads + 2 * self._config.num_kv_heads, self._config.head_dim)
        rotation = None if config.rotary is None else step.rotations[config.rotary]
        key_cache, value_cache = step.kv_cache.layer(index)
        if rotation is not None and layer.rotates_at_once:
            query = self._kernels.rotate_and_cache(
                qkv, rotation, key_cache, value_cache, step.slot_mapping, layer.head_norms
            )
        else:
            query, key, value = self._rotate(layer, qkv, rotation)
            self._kernels.reshape_and_cache(key, value, key_cache, value_cache, step.slot_mapping)
        kept = self._kept(index, step)
        plan = step.plans[config.window] if kept is None else step.last_plan
        assert plan is not None, "tokens that a layer goes on with have a plan"
        attended = self._kernels.paged_attention(
            _rows(query, kept),
            key_cache,
            value_cache,
            plan,
            scale=config.scale,
            soft_cap=self._config.attention_soft_cap,
        )  # [num_tokens, num_heads, head_dim]
        return layer.output(attended.flatten(1), add)

    def _rotate(
        self, layer: DecoderLayer, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key and plain value, each [num_tokens, heads, head_dim]."""
        config = self._config
        num_rotated = config.num_heads + config.num_kv_heads
        query_key, value = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if layer.query_norm is None or layer.key_norm is None:
            if rotation is not None:
                query_key = self._kernels.rotary_embedding(query_key, *rotation)
            return query_key[:, : config.num_heads], query_key[:, config.num_heads :], value
        query = layer.query_norm(query_key[:, : config.num_heads])
        key = layer.key_norm(query_key[:, config.num_heads :])
        if rotation is not None:
            query = self._kernels.rotary_embedding(query, *rotation)
            key = self._kernels.rotary_embedding(key, *rotation)
        return query, key, value


def build_decoder(
    read: Callable[[JsonConfig], DecoderConfig], json_config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels
) -> LanguageModel:
    """`read` is the family's. Raises ConfigurationError for what cannot run."""
    config = read(json_config)
    checkpoint.add_missing_prefix(config.names.prefix.partition(".")[0])
    num_kv_heads = own_heads(config, checkpoint.shard).num_kv_heads
    return LanguageModel(
        decoder=Decoder(config, checkpoint, kernels),
        encoder=None,
        kv_shape=KVCacheShape(len(config.layers), num_kv_heads, config.head_dim, checkpoint.dtype),
        num_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        max_model_len=config.max_positions,
        max_encoder_len=0,
        hidden_size=config.embedding_size,
        can_be_recorded=all(layer.moe is None for layer in config.layers),
    )


def own_heads(config: DecoderConfig, shard: Shard) -> DecoderConfig:
    """The config of what one rank has. Raises ConfigurationError if the heads cannot be split."""
    num_heads = len(shard.part(config.num_heads, "attention heads"))
    return replace(config, num_heads=num_heads, num_kv_heads=len(shard.kv_heads(config.num_kv_heads)))


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x)


def _rows(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x[kept]


def _load_vocabulary(config: DecoderConfig, checkpoint: Checkpoint) -> tuple[Embedding, Linear]:
    """(token ids -> embeddings [num_tokens, embedding_size], output layer)."""
    names, shard = config.names, checkpoint.shard
    tokens = shard.tokens(config.vocab_size)
    heads = [f"{name}.weight" for name in names.head]
    stored = [f"{names.prefix}.{names.embedding}.weight", *(heads if config.tied else ())]
    table = checkpoint.rows(checkpoint.first_of(stored), tokens, config.vocab_size, config.embedding_size)
    head = next((name for name in heads if name in checkpoint), heads[0])
    output = checkpoint.output_layer(head, table, tokens, config.vocab_size, tied=config.tied)
    return shard.embedding(table, tokens), output


def _load_projection(
    checkpoint: Checkpoint, config: DecoderConfig, name: str | None, out_features: int, in_features: int
) -> Linear | None:
    if name is None:
        return None
    return checkpoint.linear([f"{config.names.prefix}.{name}"], (out_features,), in_features, bias=False)


def _load_layer(config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels, index: int) -> DecoderLayer:
    names, shard = config.names, checkpoint.shard
    prefix = f"{names.prefix}.{names.layers}.{index}"
    query_norm, key_norm = (f"{prefix}.{name}" for name in names.head_norms)
    heads, kv_heads = shard.part(config.num_heads, "attention heads"), shard.kv_heads(config.num_kv_heads)
    attention_norms = _load_norms(config, checkpoint, kernels, prefix, names.attention_norms)
    qkv = _load_qkv(config, checkpoint, prefix)
    norm_of_queries = load_head_norm(config, checkpoint, kernels, query_norm, heads, config.num_heads)
    norm_of_keys = load_head_norm(config, checkpoint, kernels, key_norm, kv_heads, config.num_kv_heads)
    head_norms: HeadNorms | None = None
    if isinstance(norm_of_queries, RmsNorm) and isinstance(norm_of_keys, RmsNorm):
        head_norms = HeadNorms(norm_of_queries.weight, norm_of_keys.weight, norm_of_queries.eps)
    return DecoderLayer(
        config=config.layers[index],
        attention_norms=attention_norms,
        qkv=qkv,
        query_norm=norm_of_queries,
        key_norm=norm_of_keys,
        head_norms=head_norms,
        rotates_at_once=head_norms is not None or norm_of_queries is None,
        output=_load_output(config, checkpoint, prefix),
        mlp_norms=_load_norms(config, checkpoint, kernels, prefix, names.mlp_norms),
        mlp=load_feed_forward(config, config.layers[index].moe, checkpoint, kernels, prefix),
    )


def _load_output(config: DecoderConfig, checkpoint: Checkpoint, prefix: str) -> Product:
    width, shard = config.num_heads * config.head_dim, checkpoint.shard
    output = checkpoint.linear(
        [f"{prefix}.{config.names.output}"],
        (config.hidden_size,),
        width,
        bias=config.output_bias,
        transposed=config.names.conv1d,
        split=shard.inputs(width, "attention outputs"),
    )
    return shard.summed(output)


def _load_norms(
    config: DecoderConfig, checkpoint: Checkpoint, kernels: Kernels, prefix: str, names: BlockNames
) -> BlockNorms:
    def load(name: str | None) -> Norm | None:
        return None if name is None else load_norm(config, checkpoint, kernels, f"{prefix}.{name}", config.hidden_size)

    return BlockNorms(load(names.enter), load(names.update), load(names.leave))


def _load_qkv(config: DecoderConfig, checkpoint: Checkpoint, prefix: str) -> Linear:
    """All queries, then all keys, then all values of this rank, whatever their order in the checkpoint."""
    names, shard = config.names, checkpoint.shard
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = (query, kv, kv) if names.qkv_layout is QkvLayout.SEPARATE else (query + 2 * kv,)
    is_as_stored = shard.size == 1 and names.qkv_layout is not QkvLayout.GROUPED
    return checkpoint.linear(
        [f"{prefix}.{name}" for name in names.qkv],
        widths,
        config.hidden_size,
        bias=config.qkv_bias,
        transposed=names.conv1d,
        split=None if is_as_stored else Split(rows=_qkv_rows(config, shard)),
    )


def _qkv_rows(config: DecoderConfig, shard: Shard) -> tuple[tuple[slice, ...], ...]:
    """The rows of this rank's queries, keys and values, in this order, in each stored layer."""
    heads, kv_heads = shard.part(config.num_heads, "attention heads"), shard.kv_heads(config.num_kv_heads)

    def rows(heads: range, first: int = 0) -> slice:
        return slice((first + heads.start) * config.head_dim, (first + heads.stop) * config.head_dim)

    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    match config.names.qkv_layout:
        case QkvLayout.SEPARATE:
            return (rows(heads),), (rows(kv_heads),), (rows(kv_heads),)
        case QkvLayout.STACKED:
            return ((rows(heads), rows(kv_heads, num_heads), rows(kv_heads, num_heads + num_kv_heads)),)
        case QkvLayout.GROUPED:
            per_group = num_heads // num_kv_heads  # queries, and behind them their key and their value
            queries = [head + 2 * (head // per_group) for head in heads]
            keys = [head * (per_group + 2) + per_group for head in kv_heads]
            return (tuple(rows(range(1), place) for place in (*queries, *keys, *(key + 1 for key in keys))),)
