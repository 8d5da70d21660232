"""Stop strings end hypotheses as in transformers' `generate`, wherever in a token they begin or end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oracle import PROMPTS
from tiny import VOCAB_SIZE, load_oracle, save_tiny
from trivium import LLM, RequestOutput, SamplingParams, TokensPrompt
from trivium.params import BeamSettings

NUM_CASES = 24
TIE = 1e-5
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to several of three letters: many of them hold a stop string, or pieces of it."""
    rng = random.Random(3)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(rng.choices("abc", k=rng.randint(3, 9))) for _ in range(3000)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_params(rng: random.Random) -> SamplingParams:
    width = rng.randint(2, 6)
    return SamplingParams(
        n=rng.choice((1, width)),
        temperature=0.0,
        max_tokens=rng.choice((6, 12)),
        min_tokens=rng.choice((0, 4)),
        # To `generate` special tokens are text, and separate the letters beside them.
        suppress_tokens=(0, 3),
        bad_words_token_ids=((1,),),
        stop=tuple("".join(rng.choices("abc", k=rng.choice((2, 3, 4, 5)))) for _ in range(rng.randint(1, 3))),
        include_stop_str_in_output=rng.random() < 0.5,
        beam=BeamSettings(
            width=width,
            length_penalty=rng.choice((1.0, 2.0, 0.0, -1.0)),
            early_stopping=rng.choice((True, False, "never")),
        ),
    )


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_hypotheses_end_where_transformers_ends_them(tmp_path: Path, family: str) -> None:
    """Prompts end with a special token: `generate` would find stop strings that begin in the prompt, we do not."""
    tokenizer = letters_tokenizer()
    path = save_tiny(family, tmp_path)
    tokenizer.save_pretrained(path)
    rng = random.Random(family)
    prompts, params = zip(*(((*rng.choice(PROMPTS), 1), make_params(rng)) for _ in range(NUM_CASES)), strict=True)
    with LLM(str(path), max_num_seqs=16, num_threads=1) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], list(params), use_tqdm=False
        )
        assert llm.engine_loop.scheduler.num_held_blocks == 0
    model = load_oracle(path)
    num_stopped = sum(
        compare(output, prompt, param, model, tokenizer)
        for output, prompt, param in zip(outputs, prompts, params, strict=True)
    )
    assert num_stopped > NUM_CASES // 3, "hardly any stop string was met"


def compare(output: RequestOutput, prompt: tuple[int, ...], params: SamplingParams, model: Any, tokenizer: Any) -> int:
    """How many of the sequences were ended by a stop string."""
    beam = params.beam
    assert beam is not None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beam.width,
            num_return_sequences=params.n,
            length_penalty=beam.length_penalty,
            early_stopping=beam.early_stopping,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens or None,
            suppress_tokens=list(params.suppress_tokens),
            bad_words_ids=[list(ids) for ids in params.bad_words_token_ids],
            stop_strings=list(params.stop),
            tokenizer=tokenizer,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    num_stopped = 0
    for choice, sequence, score in zip(
        output.outputs, expected.sequences[:, start:].tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        assert choice.cumulative_logprob is not None
        ours = choice.cumulative_logprob / len(choice.token_ids) ** beam.length_penalty
        assert abs(ours - score) <= 1e-4 * max(1.0, abs(score)), params
        assert choice.token_ids == sequence[: len(choice.token_ids)] or abs(ours - score) < TIE, params
        whole = tokenizer.decode(choice.token_ids, skip_special_tokens=True)
        met = [(whole.index(stop), index) for index, stop in enumerate(params.stop) if stop in whole]
        if not met:
            assert choice.text == whole
            continue
        num_stopped += 1
        place, index = min(met)  # all were completed by the same token
        stop = params.stop[index]
        end = place + len(stop) if params.include_stop_str_in_output else place
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (whole[:end], "stop", stop), params
        last = tokenizer.decode(choice.token_ids[-1:])
        assert len(whole) - len(last) < place + len(stop), "it ends with the token that completes it"
    return num_stopped
