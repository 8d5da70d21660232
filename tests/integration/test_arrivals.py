"""Every encoder-decoder family with requests that come while others run, and prompts of every kind in between."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from oracle import oracle
from tiny import BART_LIKE, T5_LIKE, save_tiny
from trivium import LLM, ExplicitEncoderDecoderPrompt, SamplingParams, TextPrompt, TokensPrompt
from trivium.inputs import EncodedPrompt, GenerationRequest, Prompt
from trivium.outputs import CompletionOutput
from trivium.prompts import encode_prompt

NUM_REQUESTS = 24


def make_prompt(rng: random.Random) -> Prompt:
    """Text, tokens or a pair of them, of any length."""
    text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 20)))
    ids = [rng.randint(5, 250) for _ in range(rng.randint(1, 30))]
    decoder_ids = [rng.randint(5, 250) for _ in range(rng.randint(1, 5))]
    kinds: list[Prompt] = [
        text,
        TextPrompt(prompt=text),
        TokensPrompt(prompt_token_ids=ids),
        ExplicitEncoderDecoderPrompt(encoder_prompt=text, decoder_prompt=None),
        ExplicitEncoderDecoderPrompt(encoder_prompt=text, decoder_prompt="ab"),
        ExplicitEncoderDecoderPrompt(
            encoder_prompt=TokensPrompt(prompt_token_ids=ids), decoder_prompt=TextPrompt(prompt="c")
        ),
        ExplicitEncoderDecoderPrompt(
            encoder_prompt=TextPrompt(prompt=text), decoder_prompt=TokensPrompt(prompt_token_ids=decoder_ids)
        ),
    ]
    return rng.choice(kinds)


@pytest.mark.parametrize("family", sorted({*BART_LIKE, *T5_LIKE}))
def test_requests_arriving_at_random_get_what_transformers_says(tmp_path: Path, family: str) -> None:
    path = save_tiny(family, tmp_path, with_tokenizer=True)
    rng = random.Random(family)
    prompts = [make_prompt(rng) for _ in range(NUM_REQUESTS)]
    delays = [rng.random() * 0.3 for _ in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=12, seed=0)
    with LLM(str(path), max_num_seqs=7, max_num_batched_tokens=32, num_threads=1) as llm:

        async def one(prompt: Prompt, delay: float) -> tuple[EncodedPrompt, list[int]]:
            encoded = await encode_prompt(prompt, llm._engine, llm.model_info)
            await asyncio.sleep(delay)
            output = CompletionOutput(0)
            async for delta in llm._engine.generate(GenerationRequest(str(delay), encoded, params, stream=True)):
                output.add(delta)
            return encoded, output.token_ids

        async def all_of_them() -> list[tuple[EncodedPrompt, list[int]]]:
            return await asyncio.gather(*map(one, prompts, delays))

        results = llm._call(all_of_them())
        assert llm.engine_loop.scheduler.num_held_blocks == 0
    for encoded, tokens in results:
        assert encoded.encoder_token_ids is not None
        expected = oracle(path, list(encoded.encoder_token_ids), max_tokens=12, decoder=list(encoded.token_ids))
        assert tokens == expected
