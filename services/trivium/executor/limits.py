"""What a loaded model may be asked for: bounds of plans and requests, from settings, weights and memory."""

from __future__ import annotations

import logging

import torch

from trivium.config import ExecutorConfig, ModelInfo
from trivium.errors import ConfigurationError
from trivium.executor.input_batch import BatchLimits
from trivium.executor.kv_cache import (
    affordable_model_len,
    available_memory_bytes,
    choose_num_blocks,
    choose_num_host_blocks,
)
from trivium.executor.model_config import CONFIG_FILE, SpecialTokens
from trivium.executor.models.model import LanguageModel
from trivium.executor.parallel.communicator import Communicator, agree_on_least

logger = logging.getLogger(__name__)


def choose_limits(
    config: ExecutorConfig, model: LanguageModel, device: torch.device, communicator: Communicator
) -> BatchLimits:
    """Of the ranks of a split model, which share the memory of this machine, the one that can hold least decides.

    Raises ConfigurationError.
    """
    available_bytes = available_memory_bytes() // communicator.size
    max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
    if config.max_model_len is None:
        max_model_len = affordable_model_len(
            config,
            model.kv_shape,
            max_model_len,
            model.max_encoder_len,
            available_bytes=available_bytes,
            device=device,
        )
    elif config.max_model_len > max_model_len:
        logger.warning("max_model_len adjusted from %d to the model's %d", config.max_model_len, max_model_len)
    (max_model_len,) = agree_on_least(communicator, [max_model_len])
    num_blocks = choose_num_blocks(
        config,
        model.kv_shape,
        max_model_len,
        model.max_encoder_len,
        available_bytes=available_bytes,
        device=device,
    )
    num_host_blocks = choose_num_host_blocks(config, model.kv_shape, available_bytes=available_bytes)
    num_blocks, num_host_blocks = agree_on_least(communicator, [num_blocks, num_host_blocks])
    return BatchLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_encoder_len=model.max_encoder_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        vocab_size=model.vocab_size,
        num_host_blocks=num_host_blocks,
        hidden_size=model.hidden_size,
    )


def describe_model(
    config: ExecutorConfig,
    architecture: str,
    model: LanguageModel,
    limits: BatchLimits,
    special: SpecialTokens,
    *,
    max_plans_in_flight: int,
) -> ModelInfo:
    decoder_start = special.decoder_start
    if model.encoder is not None and decoder_start is None:
        decoder_start = special.bos
        if decoder_start is None:
            raise ConfigurationError(f"{CONFIG_FILE}: neither decoder_start_token_id nor bos_token_id is set")
    return ModelInfo(
        name=config.served_model_name,
        architecture=architecture,
        is_encoder_decoder=model.encoder is not None,
        max_model_len=limits.max_model_len,
        max_encoder_len=limits.max_encoder_len,
        vocab_size=limits.vocab_size,
        dtype=str(model.kv_shape.dtype).removeprefix("torch."),
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        num_host_blocks=limits.num_host_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        eos_token_ids=special.eos,
        bos_token_id=special.bos,
        pad_token_id=special.pad,
        decoder_start_token_id=decoder_start,
        forced_bos_token_id=special.forced_bos,
        forced_eos_token_id=special.forced_eos,
        hidden_size=limits.hidden_size,
        max_plans_in_flight=max_plans_in_flight,
    )
