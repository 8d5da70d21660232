"""Reading generation_config.json."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, GenerationConfig

from toy import make_info
from trivium.config import GenerationDefaults
from trivium.errors import ConfigurationError
from trivium.executor.generation_config import (
    check_generation_defaults,
    read_generation_config,
    read_generation_defaults,
)
from trivium.executor.model_config import JsonConfig, read_json, read_special_tokens

VALUES: dict[str, Any] = {
    "max_length": 142,
    "min_length": 56,
    "num_beams": 4,
    "length_penalty": 2.0,
    "early_stopping": True,
    "no_repeat_ngram_size": 3,
    "forced_bos_token_id": 0,
    "bad_words_ids": [[1], [2], [5, 6]],
    "suppress_tokens": [7, 8],
    "begin_suppress_tokens": [9],
    "temperature": 0.7,
    "do_sample": False,
}


def read(generation: JsonConfig) -> GenerationDefaults:
    return read_generation_defaults(generation, eos_token_ids=(2,))


def test_a_file_written_by_transformers_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    GenerationConfig(**VALUES | {"temperature": None}).save_pretrained(tmp_path)
    defaults = read(read_generation_config("auto", tmp_path, JsonConfig({})))
    oracle = GenerationConfig.from_pretrained(tmp_path)
    for field in fields(GenerationDefaults):
        value = getattr(oracle, field.name)
        value = tuple(value) if field.name.endswith("suppress_tokens") else value
        if field.name != "bad_words_ids":
            assert getattr(defaults, field.name) == value, field.name
    assert defaults.bad_words_ids == ((1,), (5, 6))  # a ban of EOS alone has no effect


def test_a_checkpoint_without_the_file_says_it_in_config_json(tmp_path: Path) -> None:
    config = BartConfig().to_dict() | VALUES
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_json(tmp_path / "config.json")
    defaults = read(read_generation_config("auto", tmp_path, model))
    oracle = GenerationConfig.from_pretrained(tmp_path, config_file_name="config.json")
    assert (defaults.max_length, defaults.num_beams, defaults.length_penalty) == (142, 4, 2.0)
    assert (oracle.max_length, oracle.num_beams, oracle.length_penalty) == (142, 4, 2.0)


def test_none_ignores_the_file_and_what_it_forces(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(VALUES | {"eos_token_id": 5}))
    model = JsonConfig(VALUES | {"eos_token_id": 3, "decoder_start_token_id": 4})
    generation = read_generation_config("none", tmp_path, model)
    assert read(generation) == GenerationDefaults()
    special = read_special_tokens(model, generation, {"forced_eos_token_id": 2})
    assert (special.eos, special.decoder_start, special.forced_bos, special.forced_eos) == ((3,), 4, None, None)


@pytest.mark.parametrize("name", ["generation_config.json", "other.json"])
def test_another_file_or_directory_takes_its_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"num_beams": 2}))
    path = tmp_path / name if name == "other.json" else tmp_path
    assert read(read_generation_config(str(path), tmp_path / "model", JsonConfig(VALUES))).num_beams == 2


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"num_beams": "four"}, "num_beams must be an integer"),
        ({"max_length": -1}, "max_length must not be negative"),
        ({"early_stopping": "soon"}, "early_stopping must be"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids must be a token id"),
        ({"suppress_tokens": list(range(2000))}, "suppress_tokens has 2000 entries"),
        ({"do_sample": 1}, "do_sample must be true or false"),
    ],
)
def test_a_wrong_value_is_refused_at_start(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        read(JsonConfig(values, file="generation_config.json"))


@pytest.mark.parametrize(
    ("defaults", "complaint"),
    [
        ({"num_beams": 40}, "num_beams must be an integer in .*; --generation-config=none"),
        ({"do_sample": True, "temperature": 9.0}, "temperature must be a number"),
        ({"bad_words_ids": ((10**6,),)}, "bans token 1000000"),
    ],
)
def test_defaults_that_no_request_could_use_are_refused_at_start(defaults: dict[str, Any], complaint: str) -> None:
    info = make_info(
        is_encoder_decoder=True,
        max_encoder_len=20,
        decoder_start_token_id=0,
        generation_defaults=GenerationDefaults(**defaults),
    )
    with pytest.raises(ConfigurationError, match=complaint):
        check_generation_defaults(info)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must be auto, none or a file or directory"):
        read_generation_config(str(tmp_path / "missing"), tmp_path, JsonConfig({}))
