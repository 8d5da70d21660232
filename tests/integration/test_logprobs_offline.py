"""Log-probabilities of `LLM` against log_softmax of the transformers model, whatever the engine does to its rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oracle import PROMPTS
from tiny import load_oracle
from trivium import (
    LLM,
    CompletionOutput,
    ExplicitEncoderDecoderPrompt,
    Logprob,
    RequestOutput,
    SamplingParams,
    TokensPrompt,
)
from trivium.inputs import Prompt
from trivium.scheduler.scheduler import Scheduler

SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=3, prompt_logprobs=2)
DECODER = [9, 30, 31, 32, 33, 34, 35]


def prompts_of(family: str) -> list[Prompt]:
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS[:8]]
    if family in ("llama", "qwen3"):
        return list(prompts)
    decoder = TokensPrompt(prompt_token_ids=DECODER)
    return [ExplicitEncoderDecoderPrompt(encoder_prompt=prompt, decoder_prompt=decoder) for prompt in prompts]


def expected_logprobs(path: Path, prompt: list[int], encoder: list[int] | None, output: list[int]) -> torch.Tensor:
    """[num_tokens - 1, vocab_size]: row i is of the token at position i + 1."""
    model = load_oracle(path)
    sequence = torch.tensor([prompt + output])
    with torch.inference_mode():
        if encoder is None:
            logits = model(input_ids=sequence).logits
        else:
            logits = model(input_ids=torch.tensor([encoder]), decoder_input_ids=sequence).logits
    return torch.log_softmax(logits[0].double(), dim=-1)[:-1]


def check_position(found: dict[int, Logprob], token_id: int, expected: torch.Tensor, num_top: int) -> None:
    order = expected.argsort(descending=True).tolist()
    own = found[token_id]
    assert own.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
    assert expected[order[own.rank - 1]].item() == pytest.approx(own.logprob, abs=2e-4)
    top = {value.rank: (key, value.logprob) for key, value in found.items() if value.rank <= num_top}
    assert sorted(top) == list(range(1, num_top + 1))
    for rank, (_, logprob) in top.items():
        assert logprob == pytest.approx(expected[order[rank - 1]].item(), abs=1e-4)
    assert len(found) == num_top + (own.rank > num_top)


def check_choices(path: Path, output: RequestOutput, num_top: int | None) -> torch.Tensor:
    """The sampled tokens of `output` against transformers; what that says of the last choice."""
    assert num_top is not None
    prompt, encoder = output.prompt_token_ids, output.encoder_prompt_token_ids
    for choice in output.outputs:
        expected = expected_logprobs(path, prompt, encoder, choice.token_ids)
        assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
        for token_id, found, row in zip(choice.token_ids, choice.logprobs, expected[len(prompt) - 1 :], strict=True):
            check_position(found, token_id, row, num_top)
        own = [found[token_id].logprob for token_id, found in zip(choice.token_ids, choice.logprobs, strict=True)]
        assert choice.cumulative_logprob == pytest.approx(math.fsum(own))
    return expected


def check(path: Path, output: RequestOutput, sampling: SamplingParams) -> None:
    """Every number of `output` against transformers."""
    prompt, expected = output.prompt_token_ids, check_choices(path, output, sampling.logprobs)
    assert sampling.prompt_logprobs is not None
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for token_id, of_prompt, row in zip(
        prompt[1:], output.prompt_logprobs[1:], expected[: len(prompt) - 1], strict=True
    ):
        assert of_prompt is not None
        check_position(of_prompt, token_id, row, sampling.prompt_logprobs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bart", "t5_gated"])
def test_sampled_and_prompt_tokens_equal_transformers(checkpoints: dict[str, Path], family: str) -> None:
    with LLM(str(checkpoints[family]), num_threads=1) as llm:
        for output in llm.generate(prompts_of(family), SAMPLED, use_tqdm=False):
            check(checkpoints[family], output, SAMPLED)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_chunked_prompts_and_several_choices(checkpoints: dict[str, Path], family: str) -> None:
    sampling = replace(SAMPLED, n=3, prompt_logprobs=0)
    with LLM(str(checkpoints[family]), num_threads=1, max_num_batched_tokens=5, max_num_seqs=4) as llm:
        for output in llm.generate(prompts_of(family), sampling, use_tqdm=False):
            check(checkpoints[family], output, sampling)


def test_penalties_and_filters_do_not_show(checkpoints: dict[str, Path]) -> None:
    bias = {7: 100.0}
    sampling = replace(SAMPLED, temperature=0.3, top_k=2, repetition_penalty=1.5, logit_bias=bias, min_tokens=12)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        for output in llm.generate(prompts_of("llama"), sampling, use_tqdm=False):
            assert 7 in output.outputs[0].token_ids
            check(checkpoints["llama"], output, sampling)


def test_forced_tokens_have_the_models_own_number(checkpoints: dict[str, Path]) -> None:
    """The BART checkpoint forces BOS after the start token and EOS at the limit."""
    with LLM(str(checkpoints["bart"]), num_threads=1) as llm:
        output = llm.generate([TokensPrompt(prompt_token_ids=PROMPTS[3])], SAMPLED, use_tqdm=False)[0]
    choice = output.outputs[0]
    assert choice.token_ids[0] == 1 and choice.token_ids[-1] == 2
    check(checkpoints["bart"], output, SAMPLED)


def test_preemption_loses_and_repeats_no_position(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool for a fraction of the requests, and every third preemption by hand in the middle of a prompt."""
    path = checkpoints["llama"]
    config = json.loads((path / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    bytes_per_token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 4
    schedule, in_prompt = Scheduler.schedule, 0

    def preempt_in_prompt(scheduler: Scheduler) -> object:
        nonlocal in_prompt
        for request in list(scheduler._running.values()):
            if request.num_preemptions < 2 and 3 < scheduler.num_computed_tokens(request) < request.num_prompt_tokens:
                in_prompt += 1
                scheduler._preempt(request)
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", preempt_in_prompt)
    sampling = replace(SAMPLED, ignore_eos=True, max_tokens=60)
    with LLM(str(path), num_threads=1, max_num_batched_tokens=8, kv_cache_memory_bytes=128 * bytes_per_token) as llm:
        outputs = llm.generate(prompts_of("llama"), sampling, use_tqdm=False)
        assert in_prompt > 3 and llm.engine_loop.scheduler.num_preemptions > in_prompt
    for output in outputs:
        check(path, output, sampling)


def test_a_cached_prefix_is_computed_again_for_its_logprobs_and_only_then(checkpoints: dict[str, Path]) -> None:
    prompt = TokensPrompt(prompt_token_ids=list(range(20, 90)))
    plain = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    asking = replace(plain, prompt_logprobs=1)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        kv_cache = llm.engine_loop.scheduler.kv_cache
        llm.generate(prompt, plain, use_tqdm=False)
        before = kv_cache.num_prompt_tokens_hit
        check(checkpoints["llama"], llm.generate(prompt, asking, use_tqdm=False)[0], asking)
        assert kv_cache.num_prompt_tokens_hit == before
        again = llm.generate(prompt, plain, use_tqdm=False)[0]
        assert kv_cache.num_prompt_tokens_hit > before
        assert again.prompt_logprobs is None and again.outputs[0].logprobs is not None
        check_choices(checkpoints["llama"], again, 1)


def test_nothing_is_reported_unless_asked_for(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        output = llm.generate("Hello", SamplingParams(max_tokens=3), use_tqdm=False)[0]
        assert output.prompt_logprobs is None
        assert (output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None, None)


def test_best_of_returns_the_likeliest_choices_with_the_prompts_own_numbers(checkpoints: dict[str, Path]) -> None:
    sampling = replace(SAMPLED, n=6, logprobs=0)
    prompts = prompts_of("llama")

    def score(choice: CompletionOutput) -> float:
        assert choice.cumulative_logprob is not None
        return choice.cumulative_logprob / len(choice.token_ids)

    with LLM(str(checkpoints["llama"]), num_threads=1, max_num_seqs=5) as llm:
        every = llm.generate(prompts, sampling, use_tqdm=False)
        best = llm.generate(prompts, replace(sampling, n=2, best_of=6), use_tqdm=False)
        plain = llm.generate(prompts, replace(sampling, n=2, best_of=6, logprobs=None), use_tqdm=False)
    for all_choices, picked, unscored in zip(every, best, plain, strict=True):
        ranked = sorted(all_choices.outputs, key=score, reverse=True)[:2]
        assert [choice.token_ids for choice in picked.outputs] == [choice.token_ids for choice in ranked]
        assert [choice.index for choice in picked.outputs] == [0, 1]
        check(checkpoints["llama"], picked, sampling)
        assert [choice.text for choice in unscored.outputs] == [choice.text for choice in picked.outputs]
        assert all(choice.logprobs is None and choice.cumulative_logprob is None for choice in unscored.outputs)
