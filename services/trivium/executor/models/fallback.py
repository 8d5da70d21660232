"""Models without a graph of ours: transformers' own, with our paged attention behind its attention interface.

transformers is imported with this module, which is imported only for such a model. The model's body runs over packed
tokens [1, num_tokens] with their positions; each attention layer writes its keys and values to the paged cache and
attends to them there. What that needs of a model is checked when it is loaded, last of all by comparing logits with
those of transformers' own attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from trivium.errors import ConfigurationError
from trivium.executor.attention import AttentionMetadata, PagedRows
from trivium.executor.kv_cache import KVCache, KVCacheShape
from trivium.executor.loader import Checkpoint
from trivium.executor.model_config import JsonConfig
from trivium.executor.models.fallback_adapters import add_adapters
from trivium.executor.models.model import InputEmbeds, LanguageModel
from trivium_kernels.dispatch import Kernels
from trivium_kernels.paged_attention import PagedAttentionPlan

logger = logging.getLogger(__name__)

_CHECK_LENS = (13, 40)
_CHECK_TOLERANCE = 1e-3
# What models pass to attention besides tensors, scale, window and cap, and what means nothing to it.
_IGNORED = (
    "dropout",
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
)
_LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")
_TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention layer asks for. Sizes are of a head of keys and of one of values."""

    num_kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(slots=True)
class StepAttention:
    """The attention of one forward pass. Layers are told apart by the order of their calls."""

    kernels: Kernels
    kv_cache: KVCache
    metadata: AttentionMetadata
    num_calls: int = 0
    plans: dict[int | None, PagedAttentionPlan] = field(default_factory=dict)  # window -> plan

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        """query, key, value [1, heads, num_tokens, size] -> [1, num_tokens, num_heads, value size]."""
        key_cache, value_cache = self.kv_cache.layer(self.num_calls)
        self.num_calls += 1
        if window not in self.plans:
            self.plans[window] = self.metadata.plan_self(self.kernels, self.kv_cache.block_size, window=window)
        value_size = value.shape[-1]
        queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        values = F.pad(values, (0, keys.shape[-1] - value_size))
        self.kernels.reshape_and_cache(keys, values, key_cache, value_cache, self.metadata.slot_mapping)
        attended = self.kernels.paged_attention(
            queries, key_cache, value_cache, self.plans[window], scale=scale, soft_cap=soft_cap
        )
        return attended[None, ..., :value_size]


class FallbackDecoder:
    """Owns the transformers model. One forward pass at a time: its attention finds the step in this object.

    That is a field and not an argument because not all models hand extra arguments down to their attention.
    """

    def __init__(self, name: str, model: Any, kernels: Kernels) -> None:
        self._name = name
        self._kernels = kernels
        self._step: StepAttention | None = None
        self._recorded: list[AttentionCall] | None = None
        self._embedding: Any = model.get_input_embeddings()
        self._body: Any = model.base_model
        self._head: Any = model
        attention_name = f"trivium_{id(self):x}"
        transformers.AttentionInterface.register(attention_name, self._attention)
        model.set_attn_implementation(attention_name)
        setattr(model, model.base_model_prefix, _Passthrough())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        embeds: InputEmbeds | None = None,
    ) -> Tensor:
        self._step = StepAttention(self._kernels, kv_cache, metadata)
        try:
            if embeds is None:
                return metadata.wanted(self._run(positions, input_ids=token_ids))
            return metadata.wanted(self._run(positions, inputs_embeds=embeds.put_into(self._embedding(token_ids))))
        finally:
            self._step = None

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()

    def linear_layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the body, but not of the head, by their names in the causal model."""
        prefix = self._head.base_model_prefix
        modules: Iterable[tuple[str, nn.Module]] = self._body.named_modules()
        return {f"{prefix}.{name}": module for name, module in modules if type(module) is nn.Linear}

    def record_calls(self, token_ids: Tensor) -> list[AttentionCall]:
        """What the attention layers ask for, in the order of their calls. Raises ConfigurationError."""
        self._recorded = []
        try:
            self._run(torch.arange(len(token_ids)), input_ids=token_ids)
            return self._recorded
        finally:
            self._recorded = None

    def embeds_like_tokens(self, token_ids: Tensor) -> int:
        """Width of the embeddings that may take the place of token ids; 0 if the body makes something else of them.

        What attention layers put out is left out of that: they have been checked.
        """
        self._recorded = []
        positions = torch.arange(len(token_ids))
        try:
            rows: Tensor = self._embedding(token_ids)
            found = self._run(positions, inputs_embeds=rows)
            is_same = torch.allclose(found, self._run(positions, input_ids=token_ids), atol=_CHECK_TOLERANCE)
            return rows.shape[1] if is_same else 0
        except Exception:  # a model may fail in any way
            return 0
        finally:
            self._recorded = None

    def _run(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Hidden states [num_tokens, hidden] of packed input_ids or inputs_embeds."""
        packed = {name: value[None] for name, value in inputs.items()}
        hidden: Tensor = self._body(**packed, position_ids=positions[None], use_cache=False)[0]
        return hidden[0]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query, key, value [1, heads, num_tokens, head_dim]."""
        if self._recorded is not None:
            is_layer_causal = is_causal is not False and getattr(module, "is_causal", True)
            _check_arguments(self._name, attention_mask, is_layer_causal, kwargs)
            call = AttentionCall(key.shape[1], key.shape[3], value.shape[3], sliding_window)
            self._recorded.append(call)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
        assert self._step is not None, "attention runs within a forward pass"
        assert attention_mask is None, f"{self._name} made a mask that it did not make when it was checked"
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self._step.attend(query, key, value, scale=scale, window=sliding_window, soft_cap=softcap), None


@dataclass
class _BodyOutput(BaseModelOutputWithPast):
    """With all that a head may pass on."""

    cross_attentions: None = None
    router_logits: None = None


class _Passthrough(nn.Module):
    """In place of the body: hidden states go to the head as they come."""

    def forward(self, *args: object, inputs_embeds: Tensor, **kwargs: object) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=inputs_embeds)


def default_tokens(name: str) -> Mapping[str, int] | None:
    """Special token ids that the architecture's config class sets; None if transformers has no such causal model."""
    if name not in _causal_models():
        return None
    defaults = getattr(transformers, name).config_class().to_dict()
    return {key: defaults[key] for key in _TOKEN_KEYS if defaults.get(key) is not None}


def build_fallback(name: str, config: JsonConfig, checkpoint: Checkpoint, kernels: Kernels) -> LanguageModel:
    """The transformers model `name`. Raises ConfigurationError with the reason if it cannot run here."""
    if checkpoint.shard.size > 1:
        raise _refusal(
            name, f"it has no graph of ours that could be split: tensor_parallel_size {checkpoint.shard.size}"
        )
    if checkpoint.device.type != "cpu" or checkpoint.dtype is not torch.float32:
        raise _refusal(name, "it has no graph of ours, and models of transformers run on device 'cpu' only")
    _check_class(name)
    logger.warning("%s has no graph of its own here: it runs in transformers, slower, with our attention", name)
    model = _load(name, checkpoint)
    text_config = model.config.get_text_config()
    _check_config(name, text_config)
    max_model_len = _read_max_model_len(text_config)
    lens = [min(length, max_model_len or length) for length in _CHECK_LENS]
    prompts = [(torch.arange(length) * 7 + 11) % text_config.vocab_size for length in lens]
    try:
        model.set_attn_implementation("eager")
        expected = [model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in prompts]
        decoder = FallbackDecoder(name, model, kernels)
        calls = decoder.record_calls(prompts[-1])
        shape = _kv_shape(name, calls, text_config, max_model_len)
        if checkpoint.adapters is not None:
            run = partial(decoder.record_calls, prompts[-1])
            add_adapters(checkpoint.adapters, decoder.linear_layers(), run, lens[-1])
        _check_logits(name, decoder, shape, prompts, expected)
        hidden_size = decoder.embeds_like_tokens(prompts[-1])
    except ConfigurationError:
        raise
    except Exception as error:  # a model may fail in any way when it is run as it was not meant to be
        raise _refusal(name, f"it fails when run with another attention: {_reason(error)}") from error
    if max_model_len is None:
        raise _refusal(name, f"its config names no context length: {', '.join(_LENGTH_KEYS)}")
    return LanguageModel(
        decoder=decoder,
        encoder=None,
        kv_shape=shape,
        num_kv_heads=shape.num_kv_heads,
        vocab_size=expected[0].shape[1],
        max_model_len=max_model_len,
        max_encoder_len=0,
        hidden_size=hidden_size,
        can_be_recorded=False,
    )


def _causal_models() -> set[str]:
    names: Iterable[Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return {name for value in names for name in ((value,) if isinstance(value, str) else value)}


def _check_class(name: str) -> None:
    kind = getattr(transformers, name)
    if kind._is_stateful:
        raise _refusal(name, "it keeps a state besides keys and values, as state-space models do")


def _load(name: str, checkpoint: Checkpoint) -> Any:
    """The model in float32, with every tensor from the checkpoint, and no code from it."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, info = getattr(transformers, name).from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises its own, torch's and the system's errors
        raise _refusal(name, f"transformers cannot load it: {_reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigurationError(f"{checkpoint.directory} has no tensor {missing[0]}")
    checkpoint.loaded_bytes += sum(parameter.nbytes for parameter in model.parameters())
    return model.eval()


def _check_config(name: str, config: Any) -> None:
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise _refusal(name, f"layer_types {kind!r} is not supported: {', '.join(_LAYER_TYPES)}")
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for settings in nested or [parameters]:
        kind = settings.get("rope_type")
        if kind in ("dynamic", "longrope"):
            raise _refusal(name, f"rope type {kind!r} makes a request depend on what else runs")


def _check_arguments(name: str, mask: Tensor | None, is_causal: bool, arguments: Mapping[str, object]) -> None:
    if mask is not None:
        raise _refusal(name, "its attention has a mask of its own")
    if not is_causal:
        raise _refusal(name, "its attention is not causal")
    for key, value in arguments.items():
        if key not in _IGNORED and value is not None and value is not False:
            raise _refusal(name, f"its attention takes {key}, which is not supported")


def _kv_shape(name: str, calls: list[AttentionCall], config: Any, max_model_len: int | None) -> KVCacheShape:
    if len(calls) != config.num_hidden_layers:
        raise _refusal(
            name,
            f"{len(calls)} of its {config.num_hidden_layers} layers go through transformers' attention interface",
        )
    if len({(call.num_kv_heads, call.key_size, call.value_size) for call in calls}) > 1:
        raise _refusal(name, "its layers have heads of different numbers or sizes")
    if calls[0].value_size > calls[0].key_size:
        raise _refusal(name, f"its values are wider than its keys: {calls[0].value_size}, {calls[0].key_size}")
    _check_windows(name, [call.window for call in calls], config, max_model_len)
    return KVCacheShape(len(calls), calls[0].num_kv_heads, calls[0].key_size)


def _check_windows(name: str, windows: list[int | None], config: Any, max_model_len: int | None) -> None:
    """Layers must ask for the windows that the config gives them: with our attention nothing else would apply them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        expected = [window if kind == "sliding_attention" else None for kind in kinds]
    elif any(windows) or not getattr(config, "use_sliding_window", True):
        expected = windows
    else:
        expected = [window] * len(windows)

    def acts(width: int | None) -> int | None:
        return width if width and width < (max_model_len or math.inf) else None

    if [acts(width) for width in windows] != [acts(width) for width in expected]:
        raise _refusal(name, f"sliding_window {window} does not reach its attention")


def _check_logits(
    name: str, decoder: FallbackDecoder, shape: KVCacheShape, prompts: list[Tensor], expected: list[Tensor]
) -> None:
    """Run two prompts, packed and in two parts, and compare with what transformers makes of each alone."""
    block_size, num_blocks = 8, 8
    cache = KVCache(shape, len(prompts) * num_blocks, block_size)
    tables = torch.arange(len(prompts) * num_blocks).flip(0).view(len(prompts), num_blocks)
    num_done = [0] * len(prompts)
    lens = [len(prompt) for prompt in prompts]
    for ends in ([-(-length // 2) for length in lens], lens):
        spans = [torch.arange(start, end) for start, end in zip(num_done, ends, strict=True)]
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *(len(span) for span in spans)]).cumsum(0),
            slot_mapping=torch.cat(
                [
                    table[span // block_size] * block_size + span % block_size
                    for table, span in zip(tables, spans, strict=True)
                ]
            ),
            self_rows=PagedRows(tables, torch.tensor(ends)),
            cross_rows=None,
            max_model_len=max(lens),
        )
        token_ids = torch.cat([prompt[span] for prompt, span in zip(prompts, spans, strict=True)])
        logits = decoder.compute_logits(decoder.forward(token_ids, torch.cat(spans), cache, metadata))
        wanted = torch.cat([rows[span] for rows, span in zip(expected, spans, strict=True)])
        if not torch.allclose(logits, wanted, rtol=_CHECK_TOLERANCE, atol=_CHECK_TOLERANCE):
            difference = float((logits - wanted).abs().max())
            raise _refusal(name, f"with our attention its logits differ by up to {difference:.2g} from transformers'")
        num_done = ends


def _read_max_model_len(config: Any) -> int | None:
    lengths = (getattr(config, key, None) for key in _LENGTH_KEYS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _refusal(name: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"architecture {name} cannot run here: {reason}")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
