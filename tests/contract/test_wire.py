"""Every conversion is total, exact and checked: fields equal descriptors, values survive the round trip."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from trivium import columns, errors, wire
from trivium.config import GenerationDefaults, ModelInfo, PromptAdapter
from trivium.embeds import PromptEmbeds
from trivium.errors import InvalidRequestError
from trivium.inputs import EncodedPair, EncodedPrompt, GenerationRequest, PairTexts, ResumedChoice
from trivium.outputs import ChoiceDelta, FinishReason, TokenLogprobs
from trivium.params import BeamSettings, SamplingParams
from trivium.prompts import encode_prompt
from trivium.step import (
    BeamCandidates,
    CachedRequestData,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    SlotLogprobs,
    TokenRun,
)
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import executor_pb2, scheduler_pb2, tokenizer_pb2, types_pb2

# dataclass, message, fields only in the dataclass, fields only in the message
PAIRS: list[tuple[type[Any], type[Message], set[str], set[str]]] = [
    (SamplingParams, types_pb2.SamplingParams, {"output_kind"}, {"unlimited_tokens"}),
    (BeamSettings, types_pb2.BeamSettings, set(), set()),
    (TokenLogprobs, types_pb2.TokenLogprobs, set(), set()),
    (SlotLogprobs, executor_pb2.SlotLogprobs, set(), set()),
    (TokenRun, executor_pb2.TokenRun, set(), set()),
    (BeamCandidates, executor_pb2.BeamCandidates, set(), set()),
    (ModelInfo, types_pb2.ModelInfo, set(), set()),
    (ResumedChoice, scheduler_pb2.ResumedChoice, set(), set()),
    (GenerationRequest, scheduler_pb2.GenerateRequest, set(), {"model", "sampling_is_complete"}),
    (GenerationDefaults, types_pb2.GenerationDefaults, set(), set()),
    (EncodedPair, tokenizer_pb2.EncodePairResponse, set(), set()),
    (ChoiceDelta, scheduler_pb2.ChoiceDelta, {"stop_reason"}, {"stop_token_id", "stop_string"}),
    (NewRequestData, executor_pb2.SlotInit, set(), set()),
    (
        SchedulerOutput,
        executor_pb2.StepPlan,
        {"new_blocks"},
        {"grown_slots", "grown_counts", "grown_block_ids"},
    ),
    (ModelRunnerOutput, executor_pb2.StepResult, set(), {"executor_epoch"}),
]

ids = st.lists(st.integers(0, 2**32 - 1), max_size=6).map(tuple)
uint = st.integers(0, 2**32 - 1)
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=3, unique=True).map(tuple)
sampling = st.builds(
    SamplingParams,
    n=st.integers(1, 16),
    best_of=st.none(),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 10),
    no_repeat_ngram_size=st.integers(0, 256),
    encoder_repetition_penalty=st.floats(0.1, 10),
    encoder_no_repeat_ngram_size=st.integers(0, 256),
    suppress_tokens=token_ids,
    begin_suppress_tokens=token_ids,
    forced_bos_token_id=st.none() | st.integers(0, 2**31 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    prompt_lookup_num_tokens=st.integers(0, 32),
    typical_p=st.floats(0, 1),
    top_a=st.floats(0, 10),
    epsilon_cutoff=st.floats(0, 100),
    eta_cutoff=st.floats(0, 100),
    dry_multiplier=st.floats(0, 5),
    dry_base=st.floats(1.1, 4),
    dry_allowed_length=st.integers(0, 256),
    dry_range=st.integers(0, 2**31 - 1),
    dry_sequence_breaker_ids=token_ids,
    xtc_threshold=st.floats(0, 1),
    xtc_probability=st.floats(0, 1),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | token_ids.filter(bool),
    structured_outputs=st.none(),
    bad_words=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3, unique=True).map(tuple),
    bad_words_token_ids=st.lists(token_ids.filter(bool), max_size=3, unique=True).map(tuple),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=token_ids,
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    max_tokens=st.none() | st.integers(5, 100),
    min_tokens=st.integers(0, 5),
    skip_special_tokens=st.booleans(),
    truncate_prompt_tokens=st.none() | st.just(-1) | st.integers(1, 1000),
    truncation_side=st.none() | st.sampled_from(["left", "right"]),
)
structured_outputs = st.one_of(
    st.builds(
        StructuredOutputsParams,
        json=st.dictionaries(st.text("ab"), st.integers() | st.text("cd")),
        disable_any_whitespace=st.booleans(),
    ),
    st.builds(StructuredOutputsParams, json_object=st.just(True), whitespace_pattern=st.none() | st.just(" ")),
    st.builds(StructuredOutputsParams, regex=st.text("ab.*", min_size=1)),
    st.builds(StructuredOutputsParams, grammar=st.text("ab.*", min_size=1)),
    st.builds(StructuredOutputsParams, choice=st.lists(st.text("ab", min_size=1), min_size=1, max_size=3)),
)
new_request = st.builds(
    NewRequestData,
    slot=uint,
    prompt_token_ids=ids,
    output_token_ids=ids,
    num_computed_tokens=uint,
    block_ids=ids,
    sampling=sampling,
    choice_index=uint,
    max_tokens=uint,
    encoder_token_ids=ids,
    cross_block_ids=ids,
    beam_slots=ids,
    adapter=st.text(max_size=5),
    prompt_embeds=st.none() | st.binary(max_size=8),
    encoder_embeds=st.none() | st.binary(max_size=8),
    prompt_places=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=2).map(tuple),
    encoder_places=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=2).map(tuple),
    prompt_adapter=st.text(max_size=5),
)
float32 = st.floats(width=32, allow_nan=False)
beam_settings = st.builds(
    BeamSettings,
    width=st.just(6),
    length_penalty=st.floats(-5, 5),
    early_stopping=st.sampled_from([True, False, "never"]),
    num_groups=st.sampled_from([2, 3, 6]),
    diversity_penalty=st.floats(0, 5),
) | st.builds(BeamSettings, width=st.integers(1, 16))


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprobs:
    top = draw(st.lists(st.tuples(uint, float32), max_size=3))
    return TokenLogprobs(
        draw(float32), draw(uint), tuple(token_id for token_id, _ in top), tuple(logprob for _, logprob in top)
    )


some_logprobs = st.lists(token_logprobs(), max_size=3).map(tuple)
pairs = st.lists(st.tuples(uint, uint), max_size=3).map(tuple)
delta = st.builds(
    ChoiceDelta,
    index=uint,
    token_ids=ids,
    text=st.text(max_size=8),
    finish_reason=st.just(FinishReason.STOP) | st.just(FinishReason.LENGTH),
    stop_reason=st.none() | st.text(min_size=1, max_size=4) | uint,
    logprobs=some_logprobs,
    prompt_logprobs=some_logprobs,
    cumulative_logprob=st.none() | st.floats(allow_nan=False),
    num_cached_tokens=st.none() | uint,
) | st.builds(ChoiceDelta, index=uint, token_ids=ids, text=st.text(max_size=8), logprobs=some_logprobs)


@st.composite
def plans(draw: st.DrawFn) -> SchedulerOutput:
    rows = draw(st.lists(st.tuples(uint, uint), max_size=5))
    grown = draw(st.lists(st.tuples(uint, ids), max_size=4))
    return SchedulerOutput(
        step=draw(st.integers(0, 2**63)),
        scheduled_slots=tuple(slot for slot, _ in rows),
        num_scheduled_tokens=tuple(count for _, count in rows),
        new_requests=tuple(draw(st.lists(new_request, max_size=2))),
        new_blocks=CachedRequestData(tuple(slot for slot, _ in grown), tuple(blocks for _, blocks in grown)),
        encoder_slots=draw(ids),
        freed_slots=draw(ids),
        copied_blocks=draw(pairs),
        swapped_out=draw(pairs),
        swapped_in=draw(pairs),
    )


@st.composite
def candidates(draw: st.DrawFn) -> BeamCandidates:
    rows = draw(st.lists(st.tuples(float32, uint, uint, token_logprobs()), max_size=4))
    columns_of = [tuple(column) for column in zip(*rows, strict=True)] or [(), (), (), ()]
    return BeamCandidates(draw(uint), *columns_of, stops=tuple(draw(st.lists(uint, max_size=4))))


@pytest.mark.parametrize(("cls", "message", "only_cls", "only_message"), PAIRS)
def test_fields_of_dataclass_and_message_agree(
    cls: type[Any], message: type[Message], only_cls: set[str], only_message: set[str]
) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields - only_cls == set(message.DESCRIPTOR.fields_by_name) - only_message
    assert only_cls <= fields and only_message <= set(message.DESCRIPTOR.fields_by_name)


@given(structured_outputs)
def test_structured_outputs_round_trip(value: StructuredOutputsParams) -> None:
    params = SamplingParams(structured_outputs=value)
    assert wire.sampling_params_from_proto(wire.sampling_params_to_proto(params)) == params


def test_structured_outputs_without_a_kind_are_refused() -> None:
    message = types_pb2.SamplingParams(structured_outputs=types_pb2.StructuredOutputs())
    with pytest.raises(InvalidRequestError, match="exactly one"):
        wire.sampling_params_from_proto(message)


@given(sampling)
def test_sampling_params_round_trip(value: SamplingParams) -> None:
    assert wire.sampling_params_from_proto(wire.sampling_params_to_proto(value)) == value


def test_best_of_survives_the_round_trip() -> None:
    params = SamplingParams(n=1, best_of=4, temperature=0.0)
    assert wire.sampling_params_from_proto(wire.sampling_params_to_proto(params)) == params


def test_a_token_that_is_biased_twice_is_refused() -> None:
    message = types_pb2.SamplingParams(logit_bias=[types_pb2.LogitBias(token_id=5, bias=1)] * 2)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        wire.sampling_params_from_proto(message)


def test_unset_sampling_scalars_take_the_defaults() -> None:
    assert wire.sampling_params_from_proto(types_pb2.SamplingParams()) == SamplingParams()


def test_max_tokens_together_with_unlimited_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        wire.sampling_params_from_proto(types_pb2.SamplingParams(max_tokens=3, unlimited_tokens=True))


@given(plans())
def test_plan_round_trip(plan: SchedulerOutput) -> None:
    data = wire.plan_to_proto(plan).SerializeToString()
    assert wire.plan_from_proto(executor_pb2.StepPlan.FromString(data)) == plan


@given(
    st.integers(0, 2**63),
    st.lists(st.tuples(uint, uint), max_size=5),
    st.lists(
        st.builds(
            SlotLogprobs, slot=uint, sampled=st.none() | token_logprobs(), prompt_start=uint, prompt=some_logprobs
        ),
        max_size=2,
    ).map(tuple),
    st.lists(candidates(), max_size=2).map(tuple),
    st.lists(st.builds(TokenRun, slot=uint, token_ids=ids), max_size=2).map(tuple),
)
def test_result_round_trip(
    step: int,
    rows: list[tuple[int, int]],
    logprobs: tuple[SlotLogprobs, ...],
    beams: tuple[BeamCandidates, ...],
    runs: tuple[TokenRun, ...],
) -> None:
    slots, sampled = tuple(slot for slot, _ in rows), tuple(token for _, token in rows)
    output = ModelRunnerOutput(step, slots, sampled, logprobs, beams, runs)
    message = wire.result_to_proto(output, executor_epoch=7)
    assert wire.result_from_proto(message) == output and message.executor_epoch == 7


@given(beam_settings)
def test_beam_settings_round_trip(beam: BeamSettings) -> None:
    params = SamplingParams(beam=beam, temperature=0.0)
    assert wire.sampling_params_from_proto(wire.sampling_params_to_proto(params)) == params


def test_unset_beam_scalars_take_the_defaults() -> None:
    message = types_pb2.SamplingParams(temperature=0.0, beam=types_pb2.BeamSettings(width=3))
    assert wire.sampling_params_from_proto(message).beam == BeamSettings(width=3)


@given(st.lists(st.tuples(uint, delta), max_size=5))
def test_delta_batch_round_trip(rows: list[tuple[int, ChoiceDelta]]) -> None:
    error = errors.ContextLengthError("too long", param="prompt")
    batch = wire.delta_batch_to_proto(rows, [(9, error)])
    back, failed = wire.delta_batch_from_proto(scheduler_pb2.DeltaBatch.FromString(batch.SerializeToString()))
    assert back == rows
    ((handle, received),) = failed
    assert handle == 9 and type(received) is type(error) and received.body() == error.body()


@given(delta)
def test_delta_round_trip(value: ChoiceDelta) -> None:
    assert wire.delta_from_proto(wire.delta_to_proto(value)) == value


@pytest.mark.parametrize(
    "prompt",
    [
        EncodedPrompt((1, 2), text="hi"),
        EncodedPrompt((0,), encoder_token_ids=(5, 6), encoder_text="source"),
        EncodedPrompt((0, 3), text="", encoder_token_ids=(5,)),
    ],
)
def test_a_request_keeps_its_prompt(prompt: EncodedPrompt) -> None:
    resume = (ResumedChoice(0, (4, 5), 2), ResumedChoice(1, (), 0, finished=True))
    request = GenerationRequest("id", prompt, SamplingParams(seed=3), stream=True, resume=resume, traceparent="00-x")
    message = wire.generation_request_to_proto(request)
    assert wire.prompt_from_proto(message.prompt) == wire.encoded_prompt_to_prompt(prompt)
    assert wire.resume_from_proto(message) == resume
    assert message.stream and message.traceparent == "00-x"


EMBEDS = PromptEmbeds.of(bytes(range(48)), 3, 4)
SMALL = ModelInfo("m", "A", True, 10, 20, 30, "float32", 16, 99, 4, 8, hidden_size=4)


class NoTexts:
    """A TextEncoder that is never needed."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        raise AssertionError("there is no text to encode")

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        raise AssertionError("there is no text to encode")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "prompt",
    [
        EncodedPrompt(EMBEDS.placeholder_ids, embeds=EMBEDS),
        EncodedPrompt((7, 8), encoder_token_ids=EMBEDS.placeholder_ids, encoder_embeds=EMBEDS),
        EncodedPrompt((7, 0, 0, 8, 0), embeds=EMBEDS.at(((1, 3), (4, 5)))),
        EncodedPrompt((0, 9, 0, 0), embeds=EMBEDS.at(((0, 1), (2, 4)))),
        EncodedPrompt((7, 0, 0, 0), embeds=EMBEDS.at(((1, 4),)), encoder_token_ids=(5,)),
        EncodedPrompt((7,), encoder_token_ids=(0, 0, 5, 0, 6), encoder_embeds=EMBEDS.at(((0, 2), (3, 4)))),
    ],
)
async def test_embeddings_survive_with_their_digests(prompt: EncodedPrompt) -> None:
    message = wire.prompt_to_proto(wire.encoded_prompt_to_prompt(prompt))
    info = dataclasses.replace(SMALL, is_encoder_decoder=prompt.encoder_token_ids is not None)
    back = await encode_prompt(wire.prompt_from_proto(message), NoTexts(), info)
    assert back == prompt
    embeds = back.embeds or back.encoder_embeds
    assert embeds is not None and embeds.digests == EMBEDS.digests


def test_a_rendered_chat_keeps_the_places_of_embeddings() -> None:
    ids = [5, -1, 0, -3, -2, 9]
    assert wire.rendered_from_proto(wire.rendered_to_proto(ids)) == ids


def test_model_info_round_trip() -> None:
    info = ModelInfo(
        "m",
        "A",
        True,
        10,
        20,
        30,
        "float32",
        16,
        99,
        4,
        8,
        (2, 3),
        forced_bos_token_id=0,
        num_host_blocks=5,
        hidden_size=64,
    )
    soft = PromptAdapter("p", 7), PromptAdapter("q", 2, of_encoder=True)
    info = dataclasses.replace(info, adapters=("a", "b"), max_loras=3, prompt_adapters=soft, max_prompt_adapters=2)
    info = dataclasses.replace(info, max_plans_in_flight=4)
    assert wire.model_info_from_proto(wire.model_info_to_proto(info)) == info


@pytest.mark.parametrize("error", [cls("text", param="p") for cls in errors.CLIENT_ERRORS])
def test_every_client_error_survives_the_wire(error: errors.TriviumError) -> None:
    back = wire.error_from_proto(wire.error_to_proto(error))
    assert type(back) is type(error) and back.body() == error.body()


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduled_slots": b"\x01\x00\x00"},
        {"scheduled_slots": columns.pack([1, 2])},
        {"grown_slots": columns.pack([1]), "grown_counts": columns.pack([2]), "grown_block_ids": columns.pack([5])},
        {"grown_slots": columns.pack([1, 2]), "grown_counts": columns.pack([1]), "grown_block_ids": columns.pack([5])},
        {"encoder_slots": b"\x00"},
    ],
)
def test_malformed_plan_columns_are_found(changes: dict[str, bytes]) -> None:
    with pytest.raises(columns.ColumnError):
        wire.plan_from_proto(executor_pb2.StepPlan(step=1, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batch",
    [
        scheduler_pb2.DeltaBatch(handles=columns.pack([1])),
        scheduler_pb2.DeltaBatch(
            handles=columns.pack([1]), indices=columns.pack([0]), counts=columns.pack([3]), texts=[""]
        ),
        scheduler_pb2.DeltaBatch(ends=[scheduler_pb2.RowEnd(row=4)]),
        scheduler_pb2.DeltaBatch(starts=[scheduler_pb2.RowStart(row=0)]),
    ],
)
def test_malformed_delta_batches_are_found(batch: scheduler_pb2.DeltaBatch) -> None:
    with pytest.raises(columns.ColumnError):
        wire.delta_batch_from_proto(batch)


@pytest.mark.parametrize("message", [types_pb2.Prompt(), types_pb2.Prompt(single=types_pb2.SingletonPrompt())])
def test_a_prompt_without_a_kind_is_refused(message: types_pb2.Prompt) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        wire.prompt_from_proto(message)


optional_text = st.none() | st.text(max_size=8)


@given(st.builds(PairTexts, optional_text, optional_text, optional_text, optional_text))
def test_texts_of_a_pair_survive_and_absence_is_not_emptiness(texts: PairTexts) -> None:
    assert wire.pair_texts_from_proto(wire.pair_texts_to_proto(texts, "m")) == texts


@given(st.builds(EncodedPair, ids, ids, ids, st.none() | uint, st.none() | uint, st.booleans()))
def test_an_encoded_pair_survives(pair: EncodedPair) -> None:
    assert wire.encoded_pair_from_proto(wire.encoded_pair_to_proto(pair)) == pair


@given(
    st.builds(
        GenerationDefaults,
        suppress_tokens=ids,
        begin_suppress_tokens=ids,
        bad_words_ids=st.lists(ids, max_size=3).map(tuple),
        max_length=st.none() | uint,
        early_stopping=st.sampled_from([None, True, False, "never"]),
        do_sample=st.sampled_from([None, True, False]),
        temperature=st.none() | st.floats(0, 2),
    )
)
def test_generation_defaults_survive_and_false_is_not_absence(defaults: GenerationDefaults) -> None:
    info = ModelInfo("m", "A", True, 10, 20, 30, "float32", 16, 99, 4, 8, generation_defaults=defaults)
    assert wire.model_info_from_proto(wire.model_info_to_proto(info)) == info


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "a", "source_language": "en", "target_language": "fr"},
        {
            "encoder_prompt": {"prompt": "a"},
            "decoder_prompt": {"prompt_token_ids": [1]},
            "target_language": "fr",
            "decoder_start_token_id": 0,
        },
    ],
)
def test_languages_of_a_prompt_survive(prompt: Any) -> None:
    assert wire.prompt_from_proto(wire.prompt_to_proto(prompt)) == prompt


def test_an_encoded_prompt_keeps_a_start_token_of_its_own() -> None:
    prompt = wire.encoded_prompt_to_prompt(EncodedPrompt((7, 8), encoder_token_ids=(1,)))
    assert isinstance(prompt, dict) and prompt.get("decoder_start_token_id") == 7
