"""The shape of the two checkpoints: tokenizers, configurations, chat template, and how they are written to disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from trivium.demo import model_path

TRANSLATE_VOCABULARY = 800
CHAT_VOCABULARY = 640

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
LANGUAGE_TOKENS = {"fr": "<fr>", "de": "<de>", "es": "<es>"}

CHAT_PAD, CHAT_BOS, CHAT_END = "<pad>", "<s>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

# Every message is rendered, whatever its role or the type of its content, so that no request makes it raise.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = message['role'] if message['role'] in ['system', 'user', 'assistant'] else 'user' -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}"
    "{%- set text = content -%}"
    "{%- elif content is iterable and content is not mapping -%}"
    "{%- set text = content | map(attribute='text') | select('string') | join(' ') -%}"
    "{%- else -%}"
    "{%- set text = '' -%}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' + (text | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _byte_level_bpe(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE, so that any input tokenizes; digits stay apart because figures are copied one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def translate_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The translator's tokenizer, which ends every source with the end token as T5 expects."""
    special = [PAD, EOS, UNK, *LANGUAGE_TOKENS.values()]
    tokenizer = _byte_level_bpe(texts, TRANSLATE_VOCABULARY, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(LANGUAGE_TOKENS.values()),
        source_lang="en",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def chat_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The dialogue model's tokenizer, with its chat template; it adds no token of its own."""
    tokenizer = _byte_level_bpe(texts, CHAT_VOCABULARY, [CHAT_PAD, CHAT_BOS, CHAT_END, *ROLE_TOKENS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=CHAT_PAD,
        bos_token=CHAT_BOS,
        eos_token=CHAT_END,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[int]:
    """The numbers of tokens that the vocabulary is known to hold."""
    ids = tokenizer.convert_tokens_to_ids(tokens)
    return ids if isinstance(ids, list) else [ids]


def bundled_path(task: str) -> Path:
    """Where the bundled checkpoint of a task ("translate" or "chat") lies."""
    path = model_path(f"trivium-{task}")
    if path is None:
        raise ValueError(f"no bundled model for the task {task!r}")
    return path


def translate_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """A T5 v1.1 of width 128 with three layers on each side, its embedding tied to its output."""
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=320,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=96,
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model


def chat_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of width 192 with four layers and two key-value heads, its embedding tied to its output."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=128,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a checkpoint with its weights rounded to float16."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(directory)  # type: ignore[arg-type]
    # The safetensors writer leaves a file that only its owner may read.
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
