"""`LLM` against transformers, token for token, and what it says to bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from oracle import PROMPTS, oracle
from tiny import BART_LIKE, ENCODER_DECODER, FAMILIES, T5_LIKE, save_tiny
from trivium import (
    LLM,
    BeamSearchParams,
    ExplicitEncoderDecoderPrompt,
    RequestOutput,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
    zip_enc_dec_prompt_lists,
)
from trivium.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_alone_and_in_a_batch(checkpoints: dict[str, Path], family: str) -> None:
    expected = [oracle(checkpoints[family], prompt) for prompt in PROMPTS]
    with LLM(str(checkpoints[family]), max_num_seqs=6, max_num_batched_tokens=32, num_threads=1) as llm:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in together] == expected
        for prompt, tokens in zip(prompts[:3], expected, strict=False):
            assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == tokens
        assert len({tuple(tokens) for tokens in expected}) > 8, "the oracle says the same to everything"


@pytest.mark.parametrize("family", sorted({*BART_LIKE, *T5_LIKE} - {*FAMILIES}))
def test_greedy_of_the_other_families_equals_transformers(tmp_path: Path, family: str) -> None:
    path = save_tiny(family, tmp_path, seed=3, with_tokenizer=True)
    sources = PROMPTS[3:7]
    expected = [oracle(path, source) for source in sources]
    with LLM(str(path), num_threads=1) as llm:
        prompts = [TokensPrompt(prompt_token_ids=source) for source in sources]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_a_prompt_is_cached_unless_that_is_switched_off(checkpoints: dict[str, Path], enabled: bool) -> None:
    prompt = TokensPrompt(prompt_token_ids=list(range(5, 45)))
    with LLM(str(checkpoints["llama"]), num_threads=1, enable_prefix_caching=enabled) as llm:
        first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
        assert first.outputs == second.outputs
        assert (llm.engine_loop.scheduler.kv_cache.num_prompt_tokens_hit > 0) == enabled
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32 if enabled else 0)
        searched = llm.generate([prompt] * 2, BeamSearchParams(beam_width=2, max_tokens=4), use_tqdm=False)
        assert [output.num_cached_tokens for output in searched] == [32 if enabled else 0] * 2


def test_of_a_pair_the_cached_tokens_are_the_decoders(checkpoints: dict[str, Path]) -> None:
    source, target = (TokensPrompt(prompt_token_ids=list(range(5, end))) for end in (45, 25))
    prompt = ExplicitEncoderDecoderPrompt(encoder_prompt=source, decoder_prompt=target)
    with LLM(str(checkpoints["bart"]), num_threads=1) as llm:
        outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 16]
    assert len(outputs[0].prompt_token_ids) == 21 and outputs[0].outputs == outputs[1].outputs


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_prompts_of_every_kind_in_one_batch(checkpoints: dict[str, Path], family: str) -> None:
    path = checkpoints[family]
    with LLM(str(path), dtype="float", num_threads=1) as llm:
        encode = llm.get_tokenizer().encode
        prompts = [
            "Hello",
            TextPrompt(prompt="Hello"),
            TokensPrompt(prompt_token_ids=encode("Hello")),
            ExplicitEncoderDecoderPrompt(encoder_prompt="Hello", decoder_prompt="wor"),
            ExplicitEncoderDecoderPrompt(
                encoder_prompt=TokensPrompt(prompt_token_ids=[7, 8, 9]), decoder_prompt=TextPrompt(prompt="x")
            ),
            ExplicitEncoderDecoderPrompt(
                encoder_prompt=TextPrompt(prompt="Hello"), decoder_prompt=TokensPrompt(prompt_token_ids=[11, 12])
            ),
            *zip_enc_dec_prompt_lists(["Hello", "you"], [None, "a"]),
        ]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        start = llm.model_info.decoder_start_token_id
        assert start is not None
        for output in outputs:
            assert output.prompt_token_ids[0] == start and output.encoder_prompt_token_ids
            expected = oracle(path, output.encoder_prompt_token_ids, decoder=output.prompt_token_ids)
            assert output.outputs[0].token_ids == expected
        assert [output.encoder_prompt for output in outputs[:4]] == ["Hello", "Hello", None, "Hello"]
        assert [output.prompt for output in outputs[:5]] == [None, None, None, "wor", "x"]
        assert outputs[0].outputs == outputs[1].outputs == outputs[2].outputs == outputs[6].outputs


def test_sampling_is_the_same_alone_in_a_batch_and_again(checkpoints: dict[str, Path]) -> None:
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12, n=2) for seed in range(8)]
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS[:8]]

    def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
        return [[choice.token_ids for choice in output.outputs] for output in outputs]

    with LLM(str(checkpoints["llama"]), max_num_seqs=5, num_threads=1) as llm:
        batch = tokens(llm.generate(prompts, params, use_tqdm=False))
        again = tokens(llm.generate(prompts, params, use_tqdm=False))
        alone = [tokens(llm.generate(p, s, use_tqdm=False))[0] for p, s in zip(prompts, params, strict=True)]
    assert batch == again == alone
    assert all(first != second for first, second in batch), "two choices of one request should differ"


def test_an_engine_seed_makes_runs_repeatable(checkpoints: dict[str, Path]) -> None:
    runs = []
    for seed in (1, 1, 2):
        with LLM(str(checkpoints["llama"]), seed=seed, num_threads=1) as llm:
            outputs = llm.generate(["a", "b"], SamplingParams(max_tokens=10), use_tqdm=False)
            runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1] != runs[2]


def test_a_small_pool_preempts_and_changes_no_token(checkpoints: dict[str, Path]) -> None:
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    config = json.loads((checkpoints["llama"] / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    bytes_per_token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * 4
    with LLM(str(checkpoints["llama"]), num_threads=1, kv_cache_memory_bytes=160 * bytes_per_token) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.engine_loop.scheduler.num_preemptions > 0
        assert llm.engine_loop.scheduler.num_held_blocks == 0
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_stop_strings_and_text(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        whole = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].text
        stop = next(char for char in whole[2:] if char.isascii())
        cut = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[stop])
        output = llm.generate("Hello", cut, use_tqdm=False)[0].outputs[0]
        assert output.text == whole[: whole.index(stop)] and output.stop_reason == stop


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        (["ok", 5], GREEDY, "prompt must be text"),
        ([{"encoder_prompt": "a", "decoder_prompt": "b"}], GREEDY, "decoder-only"),
        ([{"prompt_token_ids": [100_000]}], GREEDY, "vocabulary"),
        ([{"prompt_token_ids": [5] * 500}], GREEDY, "context"),
        (["a", "b"], [GREEDY], "2 prompts but 1 sampling_params"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_runs(
    checkpoints: dict[str, Path], prompts: list[object], params: object, match: str
) -> None:
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        with pytest.raises(InvalidRequestError, match=match):
            llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert llm.generate("still alive", GREEDY, use_tqdm=False)[0].finished


def test_bad_words_never_appear(checkpoints: dict[str, Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        text = llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].text
        word = next(char for char in text if char.isascii())
        clean = replace(greedy, bad_words=[word])
        assert word not in llm.generate("Hello", clean, use_tqdm=False)[0].outputs[0].text
        with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
            llm.generate("Hello", replace(greedy, allowed_token_ids=[100_000]), use_tqdm=False)
