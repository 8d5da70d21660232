"""Structured outputs through the offline engine: every output is what was asked for, whoever runs beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import EOS, PAD, VOCAB_SIZE, load_oracle, save_tiny, tiny_tokenizer
from trivium import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams, TokensPrompt
from trivium.errors import InvalidRequestError
from trivium.grammar import GrammarCompiler, GrammarVocabulary, bitmask_width

FAMILIES = ("llama", "bart", "t5_gated")
PROMPT = TokensPrompt(prompt_token_ids=[40, 50, 60, 70, 80])
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["x", "yy"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}
LARK = 'start: "<" item ("," item)~0..3 ">"\nitem: /[a-c]{1,4}/'
GBNF = 'root ::= "<" item ("," item){0,3} ">"\nitem ::= [a-c] [a-c]? [a-c]?'


def is_instance_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["age", "kind", "tags"]
        and type(value["age"]) is int
        and 0 <= value["age"] <= 99
        and value["kind"] in ("x", "yy")
        and 1 <= len(value["tags"]) <= 3
        and all(type(tag) is bool for tag in value["tags"])
    )


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


# name -> (what is asked for, whether an output is it)
KINDS: dict[str, tuple[StructuredOutputsParams, Callable[[str], object]]] = {
    "json": (StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True), is_instance_of_schema),
    "regex": (
        StructuredOutputsParams(regex=r"[a-f]{3,9}-[0-9]{2}(é|😀)?"),
        lambda text: re.fullmatch(r"[a-f]{3,9}-[0-9]{2}(é|😀)?", text),
    ),
    "choice": (
        StructuredOutputsParams(choice=["yes", 'n"o\n', "\\d", "😀"]),
        ["yes", 'n"o\n', "\\d", "😀"].__contains__,
    ),
    "lark": (
        StructuredOutputsParams(grammar=LARK),
        lambda text: re.fullmatch(r"<[abc]{1,4}(,[abc]{1,4}){0,3}>", text),
    ),
    "gbnf": (
        StructuredOutputsParams(grammar=GBNF),
        lambda text: re.fullmatch(r"<[abc]{1,3}(,[abc]{1,3}){0,3}>", text),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param, with_tokenizer=True)
    with LLM(str(path)) as llm:
        yield llm


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", with_tokenizer=True)
    with LLM(str(path)) as llm:
        yield llm


def texts(llm: LLM, params: SamplingParams | BeamSearchParams | list[Any]) -> list[list[str]]:
    count = len(params) if isinstance(params, list) else 1
    return [
        [choice.text for choice in output.outputs] for output in llm.generate([PROMPT] * count, params, use_tqdm=False)
    ]


def sampled(structured: StructuredOutputsParams, **fields: Any) -> SamplingParams:
    defaults = {"temperature": 1.5, "seed": 11, "max_tokens": 80}
    return SamplingParams(**(defaults | fields), structured_outputs=structured)


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_what_was_asked_for(llm: LLM, kind: str) -> None:
    structured, accepts = KINDS[kind]
    params: list[Any] = [
        sampled(structured, temperature=0.0),
        sampled(structured, n=4),
        sampled(structured, top_k=3, top_p=0.5),
    ]
    params += [sampled(structured, seed=seed) for seed in range(8)]
    params.append(BeamSearchParams(beam_width=4, num_return_sequences=4, max_tokens=80, structured_outputs=structured))
    for output in llm.generate([PROMPT] * len(params), params, use_tqdm=False):
        for choice in output.outputs:
            assert choice.finish_reason == "stop"
            assert accepts(choice.text), choice.text


def test_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    params = [sampled(structured, seed=seed) for structured, _ in KINDS.values() for seed in range(3)]
    params += [SamplingParams(temperature=1.5, seed=4, max_tokens=30), SamplingParams(temperature=0.0, max_tokens=30)]
    params += [
        BeamSearchParams(beam_width=3, max_tokens=60, structured_outputs=structured).to_sampling_params()
        for structured, _ in KINDS.values()
    ]
    assert texts(llm, params) == [texts(llm, one)[0] for one in params]


def test_a_grammar_of_one_output_forces_it_token_by_token(llm: LLM) -> None:
    assert texts(llm, sampled(StructuredOutputsParams(regex="forced text"))) == [["forced text"]]


def test_an_output_that_is_cut_says_so(llm: LLM) -> None:
    structured = StructuredOutputsParams(json=SCHEMA)
    for params in (
        sampled(structured, max_tokens=5),
        BeamSearchParams(beam_width=2, max_tokens=5, structured_outputs=structured),
    ):
        (output,) = llm.generate(PROMPT, params, use_tqdm=False)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 5


def test_a_stop_string_cuts_and_a_complete_output_ends(llama: LLM) -> None:
    (output,) = llama.generate(PROMPT, sampled(StructuredOutputsParams(regex="abc-def"), stop=["-d"]), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
        "abc",
        "stop",
        "-d",
    )


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 20}, {"ignore_eos": True, "min_tokens": 20}])
def test_neither_ignore_eos_nor_min_tokens_go_beyond_the_end_of_a_grammar(llm: LLM, fields: dict[str, Any]) -> None:
    structured = StructuredOutputsParams(regex="[ab]{5}")
    for params in (
        sampled(structured, **fields),
        SamplingParams(
            **fields,
            temperature=0.0,
            max_tokens=30,
            structured_outputs=structured,
            beam=BeamSearchParams(beam_width=2, max_tokens=1).to_sampling_params().beam,
        ),
    ):
        (output,) = llm.generate(PROMPT, params, use_tqdm=False)
        assert re.fullmatch("[ab]{5}", output.outputs[0].text)
        assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 30}])
def test_a_grammar_without_an_end_goes_on_as_long_as_it_is_told(llama: LLM, fields: dict[str, Any]) -> None:
    params = sampled(StructuredOutputsParams(regex="[ab]*"), max_tokens=30, **fields)
    (output,) = llama.generate(PROMPT, params, use_tqdm=False)
    assert re.fullmatch("[ab]{30}", output.outputs[0].text)


def test_bans_and_biases_choose_within_the_grammar_and_yield_to_it(llama: LLM) -> None:
    ids = {letter: llama.get_tokenizer().encode(letter)[0] for letter in "ab"}
    structured = StructuredOutputsParams(regex="[ab]{6}a")
    assert texts(llama, sampled(structured, logit_bias={ids["b"]: 100.0})) == [["bbbbbba"]]
    assert texts(llama, sampled(structured, suppress_tokens=(ids["a"],))) == [["bbbbbba"]]
    assert texts(llama, sampled(structured, repetition_penalty=1.7, frequency_penalty=2.0))[0][0][-1] == "a"


def test_logprobs_are_of_the_model_not_of_the_grammar(llama: LLM) -> None:
    params = sampled(StructuredOutputsParams(regex="ab"), logprobs=0, temperature=0.0)
    (output,) = llama.generate(PROMPT, params, use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    model = load_oracle(Path(llama.model_info.name))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT["prompt_token_ids"]])).logits[0, -1].log_softmax(-1)
    first = output.outputs[0].token_ids[0]
    assert logprobs[0][first].logprob == pytest.approx(float(expected[first]), abs=1e-4)
    assert logprobs[0][first].logprob < -1  # the grammar allowed for nothing else


def test_a_small_pool_preempts_and_changes_nothing(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "llama", with_tokenizer=True)
    params = [sampled(KINDS["json"][0], seed=seed) for seed in range(12)]
    params += [sampled(StructuredOutputsParams(regex="[a-z]*"), seed=seed, ignore_eos=True) for seed in range(12)]
    with LLM(str(path)) as llm:
        expected = texts(llm, params)
    for swap_space in (0.0, 0.01):
        with LLM(str(path), kv_cache_memory_bytes=100_000, swap_space=swap_space) as llm:
            assert texts(llm, params) == expected
            assert llm.engine_loop.scheduler.num_preemptions > 0


class Allowed:
    """transformers' prefix_allowed_tokens_fn for the same grammar; `num_before` ids are not part of the output."""

    def __init__(self, structured: StructuredOutputsParams, num_before: int) -> None:
        vocabulary = GrammarVocabulary.of(tiny_tokenizer(adds_eos=False), VOCAB_SIZE)
        self._matcher = GrammarCompiler(vocabulary, [EOS]).compile(structured)
        self._num_before = num_before

    def __call__(self, batch: int, ids: torch.Tensor) -> list[int]:
        if len(ids) < self._num_before:
            return list(range(VOCAB_SIZE))  # what is forced
        matcher = self._matcher.deep_copy()
        for token_id in ids[self._num_before :].tolist():
            if matcher.is_stopped() and token_id == EOS:
                break
            if not matcher.consume_token(token_id):
                return [EOS]  # a beam of score -inf
        mask = np.zeros(bitmask_width(VOCAB_SIZE), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("kind", ["json", "regex", "choice", "lark"])
@pytest.mark.parametrize("settings", [{}, {"early_stopping": True}, {"length_penalty": 0.0}, {"length_penalty": 2.0}])
def test_beams_equal_transformers_with_prefix_allowed_tokens_fn(llm: LLM, kind: str, settings: dict[str, Any]) -> None:
    structured, accepts = KINDS[kind]
    model = load_oracle(Path(llm.model_info.name))
    model.generation_config.forced_eos_token_id = None  # it would hide that an output was cut
    is_encoder_decoder = model.config.is_encoder_decoder
    num_before = 1 if is_encoder_decoder else len(PROMPT["prompt_token_ids"])
    num_forced = int(model.generation_config.forced_bos_token_id is not None)
    width = 2
    params = BeamSearchParams(
        beam_width=width, num_return_sequences=width, max_tokens=60, structured_outputs=structured, **settings
    )
    ids = torch.tensor([PROMPT["prompt_token_ids"]])
    with torch.inference_mode():
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=60,
            do_sample=False,
            prefix_allowed_tokens_fn=Allowed(structured, num_before + num_forced),
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    for sequence, score, choice in zip(expected.sequences, expected.sequences_scores, output.outputs, strict=True):
        ids_of = sequence[num_before:].tolist()
        count = len(choice.token_ids)
        assert choice.token_ids == ids_of[:count]
        assert set(ids_of[count:]) <= {EOS, PAD}
        length = count ** settings.get("length_penalty", 1.0)
        assert choice.cumulative_logprob is not None
        assert choice.cumulative_logprob / length == pytest.approx(float(score), abs=1e-3, rel=1e-5)
        assert accepts(choice.text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "frog"}}, "frog"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "string", "format": "frog"}}, "frog"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema.json"}}, "not present"),
        ({"json": False}, "nsatisfiable"),
        ({"grammar": "start: unknown_rule"}, "unknown"),
        ({"grammar": 'root ::= ("a"'}, "Expected"),
        ({"json_object": True, "whitespace_pattern": "("}, "unclosed group"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_before_anything_runs(
    llama: LLM, fields: dict[str, Any], words: str
) -> None:
    params = sampled(StructuredOutputsParams(**fields))
    with pytest.raises(InvalidRequestError, match=words) as caught:
        llama.generate([PROMPT, PROMPT], [SamplingParams(), params], use_tqdm=False)
    assert caught.value.param == params.structured_outputs.param  # type: ignore[union-attr]
    assert caught.value.code == "invalid_grammar"


def test_a_grammar_that_turns_out_too_complex_ends_its_own_request_only(llama: LLM) -> None:
    late = 'start: "x" (' + " | ".join(f'"{index}"' for index in range(3000)) + ")"
    with pytest.raises(InvalidRequestError, match="items") as caught:
        llama.generate(PROMPT, sampled(StructuredOutputsParams(grammar=late)), use_tqdm=False)
    assert caught.value.param == "structured_outputs"
    beams = BeamSearchParams(beam_width=2, max_tokens=9, structured_outputs=StructuredOutputsParams(grammar=late))
    with pytest.raises(InvalidRequestError, match="items"):
        llama.generate(PROMPT, beams, use_tqdm=False)
    assert texts(llama, sampled(StructuredOutputsParams(regex="ok"))) == [["ok"]]
    scheduler = llama.engine_loop.scheduler
    scheduler.check_invariants()
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_a_grammar_that_costs_more_with_each_token_ends_its_own_request_only(
    llama: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivium.executor.grammar_times._STEP_S", 0.0005)
    monkeypatch.setattr("trivium.executor.grammar_times._MAX_DEBT_S", 0.02)
    ambiguous = StructuredOutputsParams(grammar='start: start start start | "a" | "a" "a" | ""')
    neighbour = sampled(StructuredOutputsParams(regex="[ab]{110}"), max_tokens=110)
    expected = texts(llama, neighbour)
    beams = BeamSearchParams(beam_width=2, max_tokens=110, ignore_eos=True, structured_outputs=ambiguous)
    for params in (sampled(ambiguous, max_tokens=110, ignore_eos=True), beams):
        with pytest.raises(InvalidRequestError, match="every token takes longer"):
            llama.generate(PROMPT, params, use_tqdm=False)
    assert texts(llama, neighbour) == expected


def test_rows_with_a_grammar_do_not_guess_beside_rows_that_do(llama: LLM) -> None:
    structured = StructuredOutputsParams(regex=r"(ab){12}-[a-c]{6}")
    guessing = {"prompt_lookup_num_tokens": 8}
    alone = texts(llama, sampled(structured)) + texts(llama, SamplingParams(temperature=0.0, max_tokens=40))
    together = texts(
        llama, [sampled(structured, **guessing), SamplingParams(temperature=0.0, max_tokens=40, **guessing)]
    )
    assert together == alone
    assert re.fullmatch(r"(ab){12}-[a-c]{6}", together[0][0])
