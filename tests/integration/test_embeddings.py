"""Vectors of `LLM.embed`, `encode` and `score` against the hidden states of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oracle import PROMPTS
from tiny import BART_LIKE, DECODER_ONLY, T5_LIKE, load_oracle, save_tiny
from trivium import LLM, PoolingParams, SamplingParams, TokensPrompt
from trivium.errors import InvalidRequestError

INPUTS = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]


def hidden_states(path: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each prompt alone, after the last norm: [num_tokens, hidden]."""
    model: Any = load_oracle(path)
    graph = model.get_encoder() if model.config.is_encoder_decoder else model.model
    with torch.inference_mode():
        return [graph(input_ids=torch.tensor([list(prompt)])).last_hidden_state[0] for prompt in prompts]


@pytest.mark.parametrize("family", [*DECODER_ONLY, *BART_LIKE, *T5_LIKE])
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    path = save_tiny(family, tmp_path, seed=3)
    expected = hidden_states(path, PROMPTS)
    is_decoder_only = family in DECODER_ONLY
    # several packs, and blocks that prompts do not fill
    with LLM(str(path), skip_tokenizer_init=True, max_num_batched_tokens=40, num_threads=1) as llm:
        for output, states, prompt in zip(llm.encode(INPUTS, use_tqdm=False), expected, PROMPTS, strict=True):
            torch.testing.assert_close(output.outputs.data, states, atol=1e-4, rtol=1e-4)
            assert output.prompt_token_ids == prompt
        outputs = llm.embed(INPUTS, use_tqdm=False)
        for output, states in zip(outputs, expected, strict=True):
            vector = F.normalize(states[-1] if is_decoder_only else states.mean(0), dim=0)
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), vector, atol=1e-4, rtol=1e-4)
            assert output.outputs.hidden_size == len(vector)
        for kind, pick in (("cls", lambda x: x[0]), ("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1])):
            (output,) = llm.embed(INPUTS[7], PoolingParams(pooling_type=kind, normalize=False), use_tqdm=False)
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), pick(expected[7]), atol=1e-4, rtol=1e-4)


def test_vectors_and_generation_do_not_disturb_each_other(checkpoints: dict[str, Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        before = llm.embed("Hello", use_tqdm=False)[0].outputs
        generated = llm.generate(INPUTS, greedy, use_tqdm=False)
        assert llm.embed("Hello", use_tqdm=False)[0].outputs == before
        again = llm.generate(INPUTS, greedy, use_tqdm=False)
        assert [output.outputs for output in again] == [output.outputs for output in generated]


def test_scores_are_cosines(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["t5"]), num_threads=1) as llm:
        a, b, c = (torch.tensor(item.outputs.embedding) for item in llm.embed(["one", "two", "three"], use_tqdm=False))
        scores = [item.outputs.score for item in llm.score("one", ["one", "two", "three"], use_tqdm=False)]
        assert scores == pytest.approx([1.0, float(a @ b), float(a @ c)], abs=1e-5)
        pairs = [item.outputs.score for item in llm.score(["one", "two"], ["three", "two"], use_tqdm=False)]
        assert pairs == pytest.approx([float(a @ c), 1.0], abs=1e-5)


def test_what_has_no_vector_is_refused(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["bart"]), num_threads=1) as llm:
        for call in (
            lambda: llm.embed("x" * 500),
            lambda: llm.embed({"encoder_prompt": "a", "decoder_prompt": "b"}),
            lambda: llm.embed("a", PoolingParams(pooling_type="all")),
            lambda: llm.embed("a", PoolingParams(pooling_type="max")),
            lambda: llm.embed("a", PoolingParams(truncate_prompt_tokens=0)),
            lambda: llm.score(["a", "b"], ["a", "b", "c"]),
        ):
            with pytest.raises(InvalidRequestError):
                call()
        (cut,) = llm.embed("x" * 500, PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)
        assert len(cut.prompt_token_ids) == 128
