"""The bundled checkpoints: present, small, and loadable as ordinary Hugging Face models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LlamaConfig, T5Config

from trivium.demo import BUNDLED_MODELS, model_path

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LIMIT = 4_000_000


def directory(name: str) -> Path:
    path = model_path(name)
    assert path is not None
    return path


def test_unknown_names_are_not_bundled() -> None:
    assert model_path("trivium-other") is None
    assert model_path("../trivium_chat") is None


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_files_are_present_and_small(name: str) -> None:
    path = directory(name)
    assert all((path / file).is_file() for file in (*FILES, "README.md"))
    assert sum(entry.stat().st_size for entry in path.iterdir()) < LIMIT
    assert "apache-2.0" in (path / "README.md").read_text(encoding="utf-8").lower()
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"


def test_translator_loads_and_translates() -> None:
    path = directory("trivium-translate")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    assert isinstance(model.config, T5Config)
    assert model.config.tie_word_embeddings and model.config.feed_forward_proj == "gated-gelu"
    assert model.num_parameters() <= 2_000_000
    encoded = tokenizer(["twenty-one houses"] * 3, return_tensors="pt")
    assert encoded["input_ids"][0, -1] == tokenizer.eos_token_id
    languages = tokenizer.convert_tokens_to_ids(["<fr>", "<de>", "<es>"])
    prompt = [[model.config.decoder_start_token_id, language] for language in languages]
    outputs = model.generate(**encoded, decoder_input_ids=torch.tensor(prompt), do_sample=False)
    assert tokenizer.batch_decode(outputs, skip_special_tokens=True) == [
        "vingt et une maisons",
        "einundzwanzig Häuser",
        "veintiuna casas",
    ]


def test_translator_obeys_the_prefix_and_defaults_to_french() -> None:
    path = directory("trivium-translate")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    encoded = tokenizer(["to German: two dogs", "to Spanish: two dogs", "two dogs"], padding=True, return_tensors="pt")
    outputs = model.generate(**encoded, do_sample=False)
    assert tokenizer.batch_decode(outputs, skip_special_tokens=True) == ["zwei Hunde", "dos perros", "deux chiens"]


def test_chat_model_loads_and_answers() -> None:
    path = directory("trivium-chat")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert isinstance(model.config, LlamaConfig)
    assert model.config.max_position_embeddings >= 512 and model.num_parameters() <= 2_000_000
    assert tokenizer.eos_token == "<|end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = [
        {"role": "user", "content": "What is 7 plus 5?"},
        {"role": "assistant", "content": "7 plus 5 is 12."},
        {"role": "user", "content": "And 5 plus 6?"},
    ]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    outputs = model.generate(**encoded, do_sample=False)
    answer = tokenizer.decode(outputs[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "5 plus 6 is 11."


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "tool_calls": []}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    ],
)
def test_chat_template_renders_any_list_of_messages(messages: list[dict[str, object]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory("trivium-chat"))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|assistant|>")
    assert text.count("<|end|>") == len(messages)


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_any_text_survives_the_tokenizer(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory(name))
    text = "Größe 3,14 … ¿qué? 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
