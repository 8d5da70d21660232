"""What a checkpoint says about generation, in our engine and in transformers: the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle import PROMPTS
from tiny import load_oracle, save_tiny
from trivium import LLM, SamplingParams, TextPrompt, TokensPrompt
from unit.tokenizer.tiny_languages import save_multilingual


def save_with(directory: Path, family: str, generation: dict[str, Any]) -> Path:
    """A tiny checkpoint whose generation_config.json says `generation`, too."""
    path = save_tiny(family, directory, with_tokenizer=True)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return path


def generate(path: Path, prompt: list[int], **inputs: Any) -> list[int]:
    """The whole decoder sequence of transformers' `generate`, with nothing but the checkpoint's own settings."""
    with torch.inference_mode():
        output = load_oracle(path).generate(input_ids=torch.tensor([prompt]), **inputs)
    return [int(token) for token in output[0]]


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize(
    "generation",
    [
        {"max_length": 9},
        {"max_length": 30, "min_length": 20, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 12, "min_new_tokens": 12, "repetition_penalty": 1.6},
        {"max_length": 14, "bad_words_ids": [[2], *([token] for token in range(20, 140))]},
    ],
)
def test_a_request_that_sets_nothing_is_what_generate_without_arguments_is(
    tmp_path: Path, family: str, generation: dict[str, Any]
) -> None:
    path = save_with(tmp_path / "model", family, generation)
    expected = [generate(path, prompt) for prompt in PROMPTS[:5]]
    with LLM(str(path), num_threads=1) as llm:
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS[:5]], use_tqdm=False)
        assert [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs] == expected
    plain = save_tiny(family, tmp_path / "plain", with_tokenizer=True)
    with LLM(str(plain), num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=20)
        other = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS[:5]], params, use_tqdm=False)
        assert [output.outputs for output in other] != [output.outputs for output in outputs]


def test_explicit_parameters_are_taken_as_they_are_but_bans_stay(tmp_path: Path) -> None:
    path = save_with(tmp_path / "model", "bart", {"max_length": 9, "min_length": 8, "bad_words_ids": [[5], [6], [7]]})
    with LLM(str(path), num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], params, use_tqdm=False)
        tokens = {token for output in outputs for token in output.outputs[0].token_ids}
        assert {len(output.outputs[0].token_ids) for output in outputs} == {40} and not tokens & {5, 6, 7}
        defaults = llm.get_default_sampling_params()
        assert (defaults.max_tokens, defaults.min_tokens, defaults.temperature) == (8, 7, 0.0)
    with LLM(str(path), num_threads=1, generation_config="none") as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=127)
        assert llm.model_info.forced_bos_token_id is None


def test_the_target_language_takes_the_place_of_the_start_token_in_mbart(tmp_path: Path) -> None:
    path = save_tiny("bart", tmp_path / "model", forced_eos_token_id=None)
    source = Path(save_multilingual(tmp_path / "tokenizer", "mbart"))
    for file in source.iterdir():
        if file.name != "config.json":
            (path / file.name).write_bytes(file.read_bytes())
    with LLM(str(path), num_threads=1) as llm:
        prompts = [
            TextPrompt(prompt="one two", source_language=de, target_language=to)
            for de, to in (("en", "fr"), ("de", "ro"))
        ]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    starts = [output.prompt_token_ids for output in outputs]
    assert len(starts[0]) == 1 and starts[0] != starts[1]
    for output in outputs:
        assert output.encoder_prompt_token_ids is not None
        expected = generate(
            path,
            output.encoder_prompt_token_ids,
            decoder_start_token_id=output.prompt_token_ids[0],
            max_new_tokens=12,
        )
        assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == expected
    assert outputs[0].encoder_prompt_token_ids != outputs[1].encoder_prompt_token_ids
