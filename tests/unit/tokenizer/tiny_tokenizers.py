"""Small tokenizers of each decoder kind, made on the spot: no download, no file in the repository."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from trivium.tokenizer.tokenizer import Tokenizer

Kind = Literal["byte_level", "metaspace", "byte_fallback", "wordpiece"]

BOS, EOS, UNK, TOOL = "<s>", "</s>", "<unk>", "<tool>"  # TOOL is an added token, but not a special one
SPECIAL = [UNK, BOS, EOS]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, doesn't it?",
    "one two three four five six seven eight nine ten; 1 + 2 = 3.",
    "bonjour le monde, ça va très bien ? naïve café",
    "日本語のテスト 中文字符 한국어 русский текст",
    "stop STOP <stop> end END \n\n user: assistant: 😀 👩‍👩‍👧 e\u0301",
] * 4
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'alien' %}{{ raise_exception('no aliens: ' + message.content) }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}</s>"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@functools.cache
def make_tokenizer(kind: Kind = "byte_level") -> Tokenizer:
    return Tokenizer(make_backend(kind))


def make_backend(kind: Kind = "byte_level", template: str | None = TEMPLATE) -> Any:
    """A transformers tokenizer around a Rust one of `kind`."""
    rust = RustTokenizer.from_str(_trained(kind))
    rust.add_tokens([TOOL])
    backend = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token=UNK, bos_token=BOS, eos_token=EOS)
    backend.chat_template = template
    return backend


@functools.cache
def _trained(kind: Kind) -> str:
    """Training orders equal scores at random, so it happens once."""
    return _BUILDERS[kind]().to_str()


def save_model(directory: Path, kind: Kind = "byte_level", template: str | None = TEMPLATE) -> str:
    """Write the tokenizer files of a model to `directory`; returns it as a source."""
    make_backend(kind, template).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return str(directory)


def save_family(directory: Path, family: Literal["marian", "m2m_100", "t5", "byt5"]) -> str:
    """Write the files that checkpoints of `family` have, around a trained sentencepiece model; returns the source."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.txt").write_text("\n".join(CORPUS))
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if family == "t5" else {}
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "spm"),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    spm = (directory / "spm.model").read_bytes()
    (directory / "spm.model").unlink()
    (directory / "spm.vocab").unlink()
    (directory / "corpus.txt").unlink()
    files = {
        "marian": ("source.spm", "target.spm"),
        "m2m_100": ("sentencepiece.bpe.model",),
        "t5": ("spiece.model",),
        "byt5": (),
    }[family]
    for name in files:
        (directory / name).write_bytes(spm)
    if family in ("marian", "m2m_100"):
        processor = sentencepiece.SentencePieceProcessor(model_proto=spm)
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate([*pieces, "<pad>"])}))
    class_name = {"marian": "Marian", "m2m_100": "M2M100", "t5": "T5", "byt5": "ByT5"}[family]
    model_type = "t5" if family == "byt5" else family
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{class_name}Tokenizer"}))
    return str(directory)


def _byte_level() -> RustTokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(CORPUS, trainer)
    return rust


def _metaspace() -> RustTokenizer:
    rust = RustTokenizer(models.Unigram())
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token=UNK, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    return rust


def _byte_fallback() -> RustTokenizer:
    """As Llama 2 has it: pieces with a leading underscore, bytes for every character that has no piece."""
    words = {f"<0x{byte:02X}>" for byte in range(256)}
    chars = {char for line in CORPUS for char in line.replace(" ", "\u2581") if char.isascii() or char == "\u2581"}
    pieces = [*SPECIAL, *sorted(words), *sorted(chars), "he", "\u2581t", "\u2581the", "on", "\u2581\u2581"]
    merges = [("h", "e"), ("\u2581", "t"), ("\u2581t", "he"), ("o", "n"), ("\u2581", "\u2581")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, byte_fallback=True, unk_token=UNK
    )
    rust = RustTokenizer(model)
    rust.add_special_tokens(SPECIAL)
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return rust


def _wordpiece() -> RustTokenizer:
    rust = RustTokenizer(models.WordPiece(unk_token=UNK))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    rust.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    return rust


_BUILDERS = {
    "byte_level": _byte_level,
    "metaspace": _metaspace,
    "byte_fallback": _byte_fallback,
    "wordpiece": _wordpiece,
}
