"""Tokenizers of the encoder-decoder families, as their checkpoints have them, around trained sentencepiece models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import sentencepiece

from unit.tokenizer.tiny_tokenizers import CORPUS, make_backend

Multilingual = Literal["mbart", "mbart50", "nllb", "m2m_100"]
Family = Literal[
    Multilingual,
    "marian",
    "marian_many",
    "marian_split",
    "pegasus",
    "blenderbot",
    "t5",
    "mt5",
    "umt5",
    "byt5",
    "madlad",
]
FAMILIES: tuple[Family, ...] = (
    *get_args(Multilingual),
    *("marian", "marian_many", "marian_split", "pegasus", "blenderbot", "t5", "mt5", "umt5", "byt5", "madlad"),
)

TARGET_CORPUS = ["le renard brun saute par-dessus le chien paresseux", "un deux trois quatre cinq six sept huit"] * 8
NLLB_CODES = ["eng_Latn", "fra_Latn", "deu_Latn", "zho_Hans", "zho_Hant"]
MARIAN_CODES = [">>fra<<", ">>deu<<", ">>por<<"]
_T5_IDS: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
_CLASSES = {"mbart": "MBart", "mbart50": "MBart50", "nllb": "Nllb", "m2m_100": "M2M100", "pegasus": "Pegasus"}
_MODEL_TYPES = {"mbart50": "mbart", "nllb": "m2m_100", "byt5": "t5", "madlad": "t5"}


def save_multilingual(directory: Path, family: Family, **settings: Any) -> str:
    """Write the tokenizer files of `family`; `settings` go into tokenizer_config.json. Returns the source."""
    directory.mkdir(parents=True)
    name = "T5"
    if family in ("mbart", "mbart50", "nllb", "m2m_100"):
        name = _CLASSES[family]
        train(
            directory / "sentencepiece.bpe.model", vocab_size=300, model_type="bpe" if family == "nllb" else "unigram"
        )
        if family == "nllb":
            settings = {"additional_special_tokens": NLLB_CODES} | settings
        if family == "m2m_100":
            _write_vocab(directory / "vocab.json", directory / "sentencepiece.bpe.model")
    elif family.startswith("marian"):
        name = "Marian"
        settings = _save_marian(directory, family) | settings
    elif family == "blenderbot":
        name = "Blenderbot"
        backend = make_backend()
        backend.save_pretrained(directory)
        (directory / "tokenizer_config.json").unlink()
    elif family == "byt5":
        name = "ByT5"
    else:
        name = _CLASSES.get(family, "T5")
        symbols = {"user_defined_symbols": ["<2fr>", "<2de>", "<2zh>", "<2zh_Latn>"]} if family == "madlad" else {}
        train(directory / "spiece.model", **_T5_IDS, **symbols)
    model_type = _MODEL_TYPES.get(family, family.partition("_")[0] if family.startswith("marian") else family)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"tokenizer_class": f"{name}Tokenizer"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def _save_marian(directory: Path, family: Family) -> dict[str, Any]:
    train(directory / "source.spm")
    train(directory / "target.spm", corpus=TARGET_CORPUS, vocab_size=60)
    if family == "marian_split":
        _write_vocab(directory / "vocab.json", directory / "source.spm")
        _write_vocab(directory / "target_vocab.json", directory / "target.spm", shift=7)
        return {"separate_vocabs": True, "source_lang": "en", "target_lang": "fr"}
    codes = MARIAN_CODES if family == "marian_many" else []
    _write_vocab(directory / "vocab.json", directory / "source.spm", directory / "target.spm", extra=codes)
    return {"source_lang": "en", "target_lang": "ROMANCE" if codes else "fr"}


def train(path: Path, corpus: list[str] = CORPUS, vocab_size: int = 200, **settings: Any) -> None:
    """Write a sentencepiece model."""
    corpus_file = path.with_suffix(".corpus")
    corpus_file.write_text("\n".join(corpus))
    prefix = path.with_suffix(".trained")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus_file),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    Path(f"{prefix}.model").rename(path)
    Path(f"{prefix}.vocab").unlink()
    corpus_file.unlink()


def _write_vocab(path: Path, *models: Path, extra: list[str] | None = None, shift: int = 0) -> None:
    """A vocab.json with </s> and <unk> first, then `shift` unused entries, all pieces, `extra` and <pad>."""
    pieces = ["</s>", "<unk>", *(f"<unused{i}>" for i in range(shift))]
    for model in models:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        pieces += [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    path.write_text(json.dumps({piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *(extra or []), "<pad>"]))}))
