"""Checkpoints of real shapes with random weights, for benchmarks: made once, kept in the temporary folder.

Each also exists as CTranslate2 model, converted through its own loaders. The tokens are named t0, t1, ..., or where the
text of the output counts, learned from the source files of Python's library. The translator copies its source
(`copying.py`), so that its outputs end by themselves, at the same length in every engine.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from copying import teach_copying
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(tempfile.gettempdir()) / f"trivium-benchmarks-{os.getuid()}"
PAD, EOS = 1, 2
_NUM_TEXT_CHARS = 2**24
_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0}
_SEQ2SEQ = {**_IDS, "decoder_start_token_id": EOS, "forced_eos_token_id": None, "forced_bos_token_id": None}


@dataclass(frozen=True, slots=True)
class Shape:
    """dtype: how the weights are stored; arithmetic is float32 for everyone.

    has_text: tokens are pieces of text. copies: its output is its source.
    """

    name: str
    model_class: str
    config_class: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    is_encoder_decoder: bool = True
    has_text: bool = False
    copies: bool = False

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def directory(self) -> Path:
        return FOLDER / self.name

    @property
    def ct2_directory(self) -> Path:
        return FOLDER / f"{self.name}-ct2"


_LLAMA_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    **_IDS,
}
LLAMA = Shape(
    "llama-135m", "LlamaForCausalLM", "LlamaConfig", _LLAMA_135M, dtype=torch.bfloat16, is_encoder_decoder=False
)
LLAMA_TEXT = replace(LLAMA, name="llama-135m-text", has_text=True)
LLAMA_FP32 = Shape("llama-135m-fp32", "LlamaForCausalLM", "LlamaConfig", _LLAMA_135M, is_encoder_decoder=False)
QWEN3 = Shape(
    "qwen3-0.6b",
    "Qwen3ForCausalLM",
    "Qwen3Config",
    {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **_IDS,
    },
    dtype=torch.bfloat16,
    is_encoder_decoder=False,
)
BART = Shape(
    "bart-base",
    "BartForConditionalGeneration",
    "BartConfig",
    {
        "vocab_size": 50265,
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024,
        **_SEQ2SEQ,
    },
)
T5 = Shape(
    "t5-small",
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        **_SEQ2SEQ,
        "pad_token_id": 0,
        "bos_token_id": None,
        "decoder_start_token_id": 0,
    },
)
MARIAN = Shape(
    "marian-6-6-copying",
    "MarianMTModel",
    "MarianConfig",
    {
        "vocab_size": 58101,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_position_embeddings": 512,
        "activation_function": "swish",
        "scale_embedding": True,
        **_SEQ2SEQ,
        "decoder_start_token_id": PAD,
        "num_beams": None,
    },
    copies=True,
)


def token(token_id: int) -> str:
    return f"t{token_id}"


def checkpoint(shape: Shape) -> Path:
    """The directory of the checkpoint, made if it is not there."""
    return _cached(shape.directory, partial(_save, shape))


def ct2_checkpoint(shape: Shape) -> Path:
    """The same checkpoint for CTranslate2, in float32."""
    return _cached(shape.ct2_directory, partial(_convert, shape, checkpoint(shape)))


def _cached(directory: Path, make: Callable[[Path], None]) -> Path:
    if not directory.exists():
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=FOLDER))
        make(unfinished)
        if directory.exists():  # somebody else was faster
            shutil.rmtree(unfinished)
        else:
            unfinished.rename(directory)
    return directory


def _save(shape: Shape, directory: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, shape.config_class)(**shape.config)
    model = getattr(transformers, shape.model_class)(config)
    if shape.copies:
        teach_copying(model)
    model.to(shape.dtype).save_pretrained(directory)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_learned_tokens(shape) if shape.has_text else _named_tokens(shape),
        eos_token=token(EOS),
        pad_token=token(shape.config["pad_token_id"]),
        unk_token=token(3),
    ).save_pretrained(directory)


def _named_tokens(shape: Shape) -> Tokenizer:
    vocabulary = {token(index): index for index in range(shape.vocab_size)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token=token(3)))


def _learned_tokens(shape: Shape) -> Tokenizer:
    """Byte-level BPE. The first ids are special tokens, as everywhere here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[token(index) for index in range(4)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_library_texts(), trainer)
    if tokenizer.get_vocab_size() != shape.vocab_size:
        raise RuntimeError(f"{_NUM_TEXT_CHARS} characters are too few for {shape.vocab_size} tokens")
    return tokenizer


def _library_texts() -> Iterator[str]:
    num_chars = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(errors="ignore")
        yield text
        num_chars += len(text)
        if num_chars > _NUM_TEXT_CHARS:
            return


def _convert(shape: Shape, source: Path, directory: Path) -> None:
    from ctranslate2.converters import transformers as loaders

    names = {"BartConfig": "BartLoader", "MarianConfig": "BartLoader", "T5Config": "T5Loader"}
    name = names.get(shape.config_class, shape.config_class.replace("Config", "Loader"))
    model: Any = getattr(transformers, shape.model_class).from_pretrained(source, dtype=torch.float32)
    config = model.eval().config
    config.normalize_before = config.add_final_layer_norm = config.add_bias_logits = False
    config.normalize_embedding = shape.config_class == "BartConfig"
    tokens = [token(index) for index in range(shape.vocab_size)]
    with torch.no_grad():
        spec = getattr(loaders, name)().get_model_spec(model)
        if shape.is_encoder_decoder:
            spec.register_source_vocabulary(tokens)
            spec.register_target_vocabulary(tokens)
            spec.config.decoder_start_token = token(shape.config["decoder_start_token_id"])
        else:
            spec.register_vocabulary(tokens)
            spec.config.layer_norm_epsilon = config.rms_norm_eps
        spec.config.bos_token = spec.config.eos_token = token(EOS)
        spec.config.unk_token = token(3)
        spec.validate()
        spec.optimize(quantization="float32")
    spec.save(str(directory))
