"""Prompt embeddings through `LLM`: the same as transformers' `inputs_embeds`, whatever else happens to the request."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeds import embed, generate_from, saved, soft_rows
from oracle import PROMPTS, oracle
from tiny import FAMILIES, load_oracle, save_tiny
from trivium import (
    LLM,
    BeamSearchParams,
    EmbedsPrompt,
    ExplicitEncoderDecoderPrompt,
    MixedPrompt,
    SamplingParams,
    TokensPrompt,
)
from trivium.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=20)
SOURCES = [prompt for prompt in PROMPTS if len(prompt) > 2][:6]


def tokens(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_beside_tokens_and_text(checkpoints: dict[str, Path], family: str) -> None:
    path = checkpoints[family]
    model = load_oracle(path)
    rows = [soft_rows(model, source, seed=seed) for seed, source in enumerate(SOURCES)]
    expected = [generate_from(path, part, max_new_tokens=20) for part in rows]
    with LLM(str(path), num_threads=1, max_num_batched_tokens=32, max_num_seqs=5, enable_prompt_embeds=True) as llm:
        others = [TokensPrompt(prompt_token_ids=source) for source in SOURCES]
        mixed = [
            prompt for pair in zip(({"prompt_embeds": part} for part in rows), others, strict=True) for prompt in pair
        ]
        outputs = tokens(llm, [*mixed, "text"])
        assert outputs[0:-1:2] == expected
        assert outputs[1::2] == [oracle(path, source) for source in SOURCES]
        assert tokens(llm, EmbedsPrompt(prompt_embeds=rows[0].numpy())) == expected[:1]
        assert len({tuple(output) for output in expected}) > 2


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_embeddings_go_with_every_kind_of_decoder_prompt(checkpoints: dict[str, Path], family: str) -> None:
    path = checkpoints[family]
    rows = soft_rows(load_oracle(path), SOURCES[3])
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        start = llm.model_info.decoder_start_token_id
        assert start is not None
        for decoder in (None, "ab", TokensPrompt(prompt_token_ids=[9, 10, 11])):
            prompt = ExplicitEncoderDecoderPrompt(
                encoder_prompt=EmbedsPrompt(prompt_embeds=rows), decoder_prompt=decoder
            )
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            expected = generate_from(path, rows, decoder=output.prompt_token_ids, max_new_tokens=20)
            assert output.outputs[0].token_ids == expected and output.prompt_token_ids[0] == start
            assert output.encoder_prompt_token_ids == [0] * len(rows)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_beam_search_equals_transformers(checkpoints: dict[str, Path], family: str) -> None:
    path = checkpoints[family]
    model = load_oracle(path)
    rows = soft_rows(model, SOURCES[4])
    settings = {"num_beams": 3, "max_new_tokens": 10, "num_return_sequences": 1}
    expected = generate_from(path, rows, **settings)
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        found = tokens(llm, {"prompt_embeds": rows}, BeamSearchParams(beam_width=3, max_tokens=10))[0]
    pad = model.generation_config.pad_token_id
    assert found == expected or found == [token for token in expected if token != pad]


def test_the_prefix_cache_knows_embeddings_by_their_numbers(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    model = load_oracle(path)
    rows = soft_rows(model, list(range(5, 55)))
    other = rows.clone()
    other[20] += 0.5  # in the second block
    expected = [generate_from(path, part, max_new_tokens=20) for part in (rows, other)]
    assert expected[0] != expected[1]
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        cache = llm.engine_loop.scheduler.kv_cache
        hits = []
        for part, output in ((rows, expected[0]), (rows.double().float(), expected[0]), (other, expected[1])):
            before = cache.num_prompt_tokens_hit
            assert tokens(llm, {"prompt_embeds": part}) == [output]
            hits.append(cache.num_prompt_tokens_hit - before)
        assert hits == [0, 48, 16]
        before = cache.num_prompt_tokens_hit
        tokens(llm, TokensPrompt(prompt_token_ids=[0] * 50))  # the placeholders themselves
        assert cache.num_prompt_tokens_hit == before


def test_the_encoder_runs_once_for_the_same_embeddings(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trivium.executor.models.bart import BartEncoder

    runs: list[int] = []
    encode = BartEncoder.encode
    monkeypatch.setattr(BartEncoder, "encode", lambda *args: (runs.append(len(args[1])), encode(*args))[1])
    path = checkpoints["bart"]
    rows = soft_rows(load_oracle(path), SOURCES[3])
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        first = tokens(llm, {"prompt_embeds": rows})
        assert tokens(llm, {"prompt_embeds": rows.clone()}) == first
        assert runs == [len(rows)]
        assert tokens(llm, {"prompt_embeds": rows.flip(0)}) == [generate_from(path, rows.flip(0), max_new_tokens=20)]
        assert tokens(llm, TokensPrompt(prompt_token_ids=[0] * len(rows))) == [oracle(path, [0] * len(rows))]
        assert runs == [len(rows)] * 3


def block_bytes(path: Path) -> int:
    config = load_oracle(path).config
    head_dim = config.hidden_size // config.num_attention_heads
    return int(16 * config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 4)


@pytest.mark.parametrize("swap_space", [0.0, 0.01])
def test_preemption_changes_no_token(checkpoints: dict[str, Path], swap_space: float) -> None:
    path = checkpoints["llama"]
    model = load_oracle(path)
    rows = [soft_rows(model, source + [7] * seed, seed=seed) for seed, source in enumerate(PROMPTS)]
    prompts = [EmbedsPrompt(prompt_embeds=part) for part in rows]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        expected = tokens(llm, prompts, params)
    settings: dict[str, Any] = {"kv_cache_memory_bytes": 10 * block_bytes(path), "swap_space": swap_space}
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True, enable_prefix_caching=False, **settings) as llm:
        assert tokens(llm, prompts, params) == expected
        scheduler = llm.engine_loop.scheduler
        assert scheduler.num_preemptions > 0 and scheduler.num_held_blocks == 0
        assert (scheduler.num_swaps > 0) == (swap_space > 0)


@pytest.mark.parametrize("max_num_seqs", [1, 8])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_choices_of_one_prompt_share_it(checkpoints: dict[str, Path], family: str, max_num_seqs: int) -> None:
    path = checkpoints[family]
    ids = SOURCES[5]
    rows = embed(load_oracle(path), ids)
    params = SamplingParams(n=4, temperature=0.8, seed=1, max_tokens=12)
    with LLM(str(path), num_threads=1, max_num_seqs=max_num_seqs, enable_prompt_embeds=True) as llm:
        both = [{"prompt_embeds": rows}, TokensPrompt(prompt_token_ids=ids)]
        embedded, plain = llm.generate(both, params, use_tqdm=False)
    assert [choice.token_ids for choice in embedded.outputs] == [choice.token_ids for choice in plain.outputs]
    assert len({tuple(choice.token_ids) for choice in embedded.outputs}) > 1


def test_log_probabilities_of_the_output_are_those_of_tokens(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    ids = SOURCES[5]
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2)
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        both = [{"prompt_embeds": embed(load_oracle(path), ids)}, TokensPrompt(prompt_token_ids=ids)]
        embedded, plain = (output.outputs[0] for output in llm.generate(both, params, use_tqdm=False))
    assert embedded.logprobs is not None and plain.logprobs is not None
    for one, other in zip(embedded.logprobs, plain.logprobs, strict=True):
        assert one.keys() == other.keys()
        assert all(abs(one[key].logprob - other[key].logprob) < 1e-4 for key in one)


WRONG: list[tuple[Any, str]] = [
    (torch.ones(3, 47), "hidden size"),
    (torch.ones(3, 48, dtype=torch.float64), "float64"),
    (np.ones((3, 48)), "float64"),
    (torch.ones(3, 48, dtype=torch.int64), "int64"),
    (torch.ones(3, 48).to_sparse(), "dense"),
    (torch.ones(3, 48, device="meta"), "dense"),
    (torch.ones(48), "shape"),
    (torch.ones(1, 3, 48), "shape"),
    (torch.ones(0, 48), "shape"),
    (torch.full((3, 48), float("nan")), "finite"),
    ([[1.0] * 48], "list"),
    (None, "NoneType"),
    ("AAAA", "str"),
    (torch.ones(129, 48), "context"),
]


def test_wrong_embeddings_are_refused_by_name(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["llama"]), num_threads=1, enable_prompt_embeds=True) as llm:
        for value, word in WRONG:
            with pytest.raises(InvalidRequestError, match=word) as caught:
                llm.generate({"prompt_embeds": value}, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
            assert caught.value.param == "prompt_embeds"
        rows = torch.ones(3, 48)
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate({"prompt_embeds": rows, "prompt": "a"}, use_tqdm=False)  # type: ignore[arg-type]
        assert caught.value.code == "conflicting_parameters"
        assert tokens(llm, {"prompt_embeds": rows})


def test_what_is_not_enabled_or_not_possible_is_refused(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm, pytest.raises(InvalidRequestError) as caught:
        llm.generate({"prompt_embeds": torch.ones(3, 48)}, use_tqdm=False)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("feature_disabled", "prompt_embeds")


FRONT, BACK = SOURCES[1], SOURCES[2]


def parts(rows: torch.Tensor) -> MixedPrompt:
    front, back = TokensPrompt(prompt_token_ids=FRONT), TokensPrompt(prompt_token_ids=BACK)
    return MixedPrompt(prompt_parts=[front, EmbedsPrompt(prompt_embeds=rows), back])


def test_tokens_around_embeddings_with_beams_choices_cache_and_log_probabilities(
    checkpoints: dict[str, Path],
) -> None:
    path = checkpoints["llama"]
    model = load_oracle(path)
    rows = soft_rows(model, list(range(5, 45)))
    whole = torch.cat((embed(model, FRONT), rows, embed(model, BACK)))
    expected = generate_from(path, whole, max_new_tokens=20)
    with LLM(str(path), num_threads=1, max_num_batched_tokens=16, enable_prompt_embeds=True) as llm:
        cache = llm.engine_loop.scheduler.kv_cache
        params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=2, logprobs=1)
        (output,) = llm.generate(parts(rows), params, use_tqdm=False)
        assert output.outputs[0].token_ids == expected
        assert output.prompt_token_ids == [*FRONT, *[0] * 40, *BACK]
        with torch.no_grad():
            logprobs = model(inputs_embeds=whole[None]).logits[0].log_softmax(-1)
        shown = output.prompt_logprobs
        assert shown is not None and len(shown) == len(whole)
        assert [item is None for item in shown] == [
            True,
            *[False] * (len(FRONT) - 1),
            *[True] * 40,
            *[False] * len(BACK),
        ]
        for position, item in enumerate(shown):
            for token_id, value in (item or {}).items():
                assert abs(value.logprob - float(logprobs[position - 1, token_id])) < 1e-4
        before = cache.num_prompt_tokens_hit
        assert tokens(llm, parts(rows)) == [expected]
        assert cache.num_prompt_tokens_hit - before == len(whole) // 16 * 16
        moved = MixedPrompt(prompt_parts=[*parts(rows)["prompt_parts"][::-1]])
        both = torch.cat((embed(model, BACK), rows, embed(model, FRONT)))
        assert tokens(llm, moved) == [generate_from(path, both, max_new_tokens=20)]
        beams = generate_from(path, whole, num_beams=3, max_new_tokens=10)
        assert tokens(llm, parts(rows), BeamSearchParams(beam_width=3, max_tokens=10))[0][: len(beams)] == beams
        many = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=12)
        (one,) = llm.generate(MixedPrompt(prompt_parts=[EmbedsPrompt(prompt_embeds=whole)]), many, use_tqdm=False)
        (other,) = llm.generate(parts(rows), many, use_tqdm=False)
        assert [choice.token_ids for choice in one.outputs] == [choice.token_ids for choice in other.outputs]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_decoder_side_of_a_pair_as_embeddings(checkpoints: dict[str, Path], family: str) -> None:
    path, source = checkpoints[family], SOURCES[3]
    model = load_oracle(path)
    target = SOURCES[2]
    rows = embed(model, target)  # of tokens, so that generate can say what comes of them
    pairs = [
        ExplicitEncoderDecoderPrompt(encoder_prompt=TokensPrompt(prompt_token_ids=source), decoder_prompt=decoder)
        for decoder in (
            EmbedsPrompt(prompt_embeds=rows),
            MixedPrompt(prompt_parts=[EmbedsPrompt(prompt_embeds=rows[:2]), TokensPrompt(prompt_token_ids=target[2:])]),
        )
    ]
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        start = llm.model_info.decoder_start_token_id
        assert start is not None
        expected = oracle(path, source, 20, [start, *target])
        assert tokens(llm, pairs) == [expected, expected]
        (output,) = llm.generate(pairs[1], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        assert output.prompt_logprobs is not None
        assert [item and list(item) for item in output.prompt_logprobs] == [None] * 3 + [
            [token] for token in target[2:]
        ]


TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}<s>"


def test_a_chat_with_embeddings_in_it(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    model = load_oracle(path)
    rows = soft_rows(model, SOURCES[3])
    with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
        encode = llm.get_tokenizer().encode
        front = encode("<s>system: be kind</s><s>user: look:\n", add_special_tokens=False)
        back = encode("\nwhat?</s><s>", add_special_tokens=False)
        whole = torch.cat((embed(model, front), rows, embed(model, back)))
        expected = generate_from(path, whole, max_new_tokens=20)
        for value in (rows, rows.numpy(), base64.b64encode(saved(rows)).decode()):
            part = {"type": "prompt_embeds", "prompt_embeds": value}
            content = [{"type": "text", "text": "look:"}, part, {"type": "text", "text": "what?"}]
            messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]
            (output,) = llm.chat(messages, GREEDY, chat_template=TEMPLATE, use_tqdm=False)
            assert output.outputs[0].token_ids == expected
            assert output.prompt_token_ids == [*front, *[0] * len(rows), *back]
        with pytest.raises(InvalidRequestError) as caught:
            wrong = [{"role": "user", "content": [{"type": "prompt_embeds", "data": rows.int()}]}]
            llm.chat(wrong, GREEDY, chat_template=TEMPLATE)
        assert caught.value.param == "messages[0].content[0].data"
    with LLM(str(checkpoints["bart"]), num_threads=1, enable_prompt_embeds=True) as llm:
        rows = soft_rows(load_oracle(checkpoints["bart"]), SOURCES[3])
        (output,) = llm.chat([{"role": "user", "content": [{"type": "prompt_embeds", "data": rows}]}], GREEDY, False)
        assert output.outputs[0].token_ids == generate_from(checkpoints["bart"], rows, max_new_tokens=20)


def test_scaled_token_embeddings_are_what_inputs_embeds_means(tmp_path: Path) -> None:
    """Of these families only one scales inside its table, and positions depend on padding in another."""
    for family in ("marian", "m2m_100"):
        path = save_tiny(family, tmp_path / family, seed=3, with_tokenizer=True)
        ids = [9, 0, 33, 0, 0, 71]
        rows = embed(load_oracle(path), ids)
        with LLM(str(path), num_threads=1, enable_prompt_embeds=True) as llm:
            assert tokens(llm, {"prompt_embeds": rows}) == [generate_from(path, rows, max_new_tokens=20)]
