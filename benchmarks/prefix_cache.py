"""Time to first token with and without a cached prefix: python benchmarks/prefix_cache.py [RUNS]

A random Llama of 30M parameters, in process, one thread pool: prompts of 1,024 shared tokens and 16 of their own. Cold
means that nothing of the prompt is cached.
"""

import logging
import statistics
import sys
import tempfile
import time

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trivium import LLM, SamplingParams, TokensPrompt

PREFIX = 1024
OWN = 16
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)


def save_model(path: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    vocabulary = {f"t{index}": index for index in range(8192)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))).save_pretrained(
        path
    )


def first_token_seconds(llm: LLM, seed: int, own: int) -> float:
    """Seconds for a prompt whose shared part is drawn from `seed` and whose own part from `own`."""
    shared = torch.randint(1, 8192, (PREFIX,), generator=torch.Generator().manual_seed(seed)).tolist()
    tail = torch.randint(1, 8192, (OWN,), generator=torch.Generator().manual_seed(own)).tolist()
    begin = time.perf_counter()
    llm.generate(TokensPrompt(prompt_token_ids=shared + tail), FIRST_TOKEN, use_tqdm=False)
    return time.perf_counter() - begin


def main(runs: int) -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as path:
        save_model(path)
        with LLM(path, max_num_batched_tokens=2048) as llm:
            first_token_seconds(llm, 0, 0)
            cold, hit = [], []
            for run in range(1, runs + 1):
                cold.append(first_token_seconds(llm, run, 1000 + run))
                hit.append(first_token_seconds(llm, run, 2000 + run))
    ratio = statistics.median(hit) / statistics.median(cold)
    print(f"cold {1e3 * statistics.median(cold):.0f} ms, hit {1e3 * statistics.median(hit):.0f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
