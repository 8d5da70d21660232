"""The code examples of other projects' pages, with only the import and the path of the model changed.

They were written for large checkpoints; here they run on tiny random ones of the same classes, and transformers says
what must come out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle import oracle
from tiny import load_oracle, save_tiny, tiny_tokenizer
from trivium import (
    LLM,
    BeamSearchParams,
    LLMGuidedOptions,
    RequestOutput,
    SamplingParams,
)
from trivium.errors import ConfigurationError, InvalidRequestError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
MakeModel = Callable[..., str]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """family -> path of a tiny checkpoint with a tokenizer."""

    def make(family: str, **overrides: Any) -> str:
        return str(save_tiny(family, tmp_path / family, with_tokenizer=True, **overrides))

    return make


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    path = save_tiny("llama", tmp_path / "chat", with_tokenizer=True, max_position_embeddings=400)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return str(path)


@pytest.fixture
def llms() -> Iterator[Callable[..., LLM]]:
    """`LLM`, closed at the end: the examples do not."""
    made: list[LLM] = []

    def make(**arguments: Any) -> LLM:
        made.append(LLM(**arguments))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


# --- encoder-decoder model support (Aphrodite) ---


def test_encoder_decoder_page_mixed_inputs_in_one_batch(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    from trivium import ExplicitEncoderDecoderPrompt, TextPrompt, TokensPrompt
    from trivium.inputs import zip_enc_dec_prompt_lists

    model = make_model("bart")
    llm = llms(model=model, dtype="float")
    tokenizer = llm.get_tokenizer()

    single_text_prompt_raw = "Hello, my name is"
    single_text_prompt = TextPrompt(prompt="The president of the United States is")
    single_tokens_prompt = TokensPrompt(prompt_token_ids=tokenizer.encode("The capital of France is"))

    enc_dec_prompt1 = ExplicitEncoderDecoderPrompt(encoder_prompt="Summarize this text:", decoder_prompt="Summary:")
    enc_dec_prompt2 = ExplicitEncoderDecoderPrompt(
        encoder_prompt=single_text_prompt, decoder_prompt=single_tokens_prompt
    )
    enc_dec_prompt3 = ExplicitEncoderDecoderPrompt(
        encoder_prompt=single_tokens_prompt, decoder_prompt=single_text_prompt
    )

    sampling_params = SamplingParams(
        temperature=0,
        top_p=1.0,
        min_tokens=0,
        max_tokens=20,
    )

    prompts = [
        single_text_prompt_raw,
        single_text_prompt,
        single_tokens_prompt,
        enc_dec_prompt1,
        enc_dec_prompt2,
        enc_dec_prompt3,
    ]
    zipped_prompt_list = zip_enc_dec_prompt_lists(
        ["An encoder prompt", "Another encoder prompt"], ["A decoder prompt", "Another decoder prompt"]
    )
    outputs = llm.generate(prompts, sampling_params) + llm.generate(zipped_prompt_list, sampling_params)

    shown = []
    for output in outputs:
        prompt = output.prompt
        encoder_prompt = output.encoder_prompt
        generated_text = output.outputs[0].text
        shown.append((encoder_prompt, prompt, generated_text))

    sources = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "Summarize this text:",
        "The president of the United States is",
        "The capital of France is",
        "An encoder prompt",
        "Another encoder prompt",
    ]
    targets = ["", "", "", "Summary:", "The capital of France is", "The president of the United States is"]
    targets += ["A decoder prompt", "Another decoder prompt"]
    start = llm.model_info.decoder_start_token_id
    for output, source, target in zip(outputs, sources, targets, strict=True):
        assert output.encoder_prompt_token_ids == tokenizer.encode(source)
        ends = tokenizer.encode(target) if output is outputs[4] else tokenizer.encode(target, add_special_tokens=False)
        assert output.prompt_token_ids == [start, *ends]
        expected = oracle(Path(model), output.encoder_prompt_token_ids, decoder=output.prompt_token_ids)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert [encoder for encoder, _, _ in shown] == [None if i in (2, 5) else sources[i] for i in range(8)]
    assert [decoder for _, decoder, _ in shown] == [None, None, None, "Summary:", None, *targets[5:]]


def test_encoder_decoder_page_prompt_types(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    """What the page's `get_prompt_type` tells apart is taken; everything else is a ValueError."""
    llm = llms(model=make_model("bart"), dtype="float")
    for prompt in (None, 5, {"text": "a"}, {"decoder_prompt": "a"}, {"encoder_prompt": {"encoder_prompt": "a"}}):
        with pytest.raises(ValueError, match="prompt"):
            llm.generate([prompt], SamplingParams(max_tokens=1))  # type: ignore[list-item]


def test_encoder_decoder_page_pairs_have_older_names() -> None:
    from trivium.inputs import (
        build_explicit_enc_dec_prompt,
        to_enc_dec_tuple_list,
        zip_enc_dec_prompt_lists,
        zip_enc_dec_prompts,
    )

    pairs = zip_enc_dec_prompt_lists(["a", "b"], ["c", None])
    assert pairs == zip_enc_dec_prompts(["a", "b"], ["c", None])
    assert pairs == [build_explicit_enc_dec_prompt("a", "c"), build_explicit_enc_dec_prompt("b")]
    assert to_enc_dec_tuple_list(pairs) == [("a", "c"), ("b", None)]


# --- encoder-decoder models for instructions ---


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_t5_translates_as_the_page_does_with_transformers(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    model_path = make_model("t5")
    model, tokenizer = load_oracle(Path(model_path)), tiny_tokenizer(adds_eos=True)
    input_text = "translate English to German: How are you?"
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids
    outputs = model.generate(input_ids)
    expected = tokenizer.decode(outputs[0], skip_special_tokens=True)

    llm = llms(model=model_path)
    (output,) = llm.generate(input_text, SamplingParams(temperature=0, max_tokens=len(outputs[0]) - 1))
    assert output.outputs[0].text == expected


def test_bart_summarizes_with_the_beams_of_the_page(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    model_path = make_model("bart", max_position_embeddings=256)
    model, tokenizer = load_oracle(Path(model_path)), tiny_tokenizer(adds_eos=True)
    instruction = "Summarize the following text:"
    text = "The quick brown fox jumps over the lazy dog. This sentence contains all letters of the alphabet."
    input_text = f"{instruction} {text}"
    inputs = tokenizer(input_text, return_tensors="pt", max_length=1024, truncation=True)
    settings: Any = dict(max_length=150, min_length=40, length_penalty=2.0, num_beams=4, early_stopping=True)
    with torch.inference_mode():
        summary_ids = model.generate(inputs["input_ids"], **settings)

    llm = llms(model=model_path)
    (output,) = llm.generate(input_text, BeamSearchParams(**settings))
    assert [llm.model_info.decoder_start_token_id, *output.outputs[0].token_ids] == summary_ids[0].tolist()
    assert output.outputs[0].text == tokenizer.decode(summary_ids[0], skip_special_tokens=True)


@pytest.mark.parametrize(("family", "max_length", "min_length"), [("marian", 40, 0), ("pegasus", 50, 10)])
def test_marian_and_pegasus_do_what_the_page_does(
    make_model: MakeModel, llms: Callable[..., LLM], family: str, max_length: int, min_length: int
) -> None:
    model_path = make_model(family, max_position_embeddings=400)
    model, tokenizer = load_oracle(Path(model_path)), tiny_tokenizer(adds_eos=True)
    text = """
The Internet of Things (IoT) is transforming how we live and work.
It connects everyday devices to the internet, allowing them to send and receive data.
This technology has applications in smart homes, healthcare, agriculture, and more.
However, it also raises concerns about privacy and security.
"""
    inputs = tokenizer(text, max_length=1024, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        summary_ids = model.generate(inputs["input_ids"], max_length=max_length, min_length=min_length)

    llm = llms(model=model_path)
    params = SamplingParams(temperature=0, max_tokens=max_length - 1, min_tokens=max(0, min_length - 1))
    (output,) = llm.generate(text, params)
    assert output.outputs[0].text == tokenizer.decode(summary_ids[0], skip_special_tokens=True)


def test_a_source_is_cut_as_the_page_cuts_it(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    """`tokenizer(text, max_length=..., truncation=True)`."""
    model_path = make_model("bart")
    tokenizer, text = tiny_tokenizer(adds_eos=True), "The quick brown fox jumps over the lazy dog."
    llm = llms(model=model_path)
    for length in (1, 2, 9, 44, 45, 46):
        params = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=length)
        (output,) = llm.generate(text, params)
        assert output.encoder_prompt_token_ids == tokenizer(text, max_length=length, truncation=True).input_ids
    with pytest.raises(InvalidRequestError, match="the model takes 128"):
        llm.generate("x" * 200)
    (output,) = llm.generate("x" * 200, SamplingParams(max_tokens=1, truncate_prompt_tokens=-1))
    assert len(output.encoder_prompt_token_ids or ()) == 128


# --- generative models (vLLM) ---


def shown(outputs: list[RequestOutput]) -> list[tuple[str | None, str]]:
    """What the page's loop prints."""
    return [(output.prompt, output.outputs[0].text) for output in outputs]


def test_generative_page_generate(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    model = make_model("llama")
    llm = llms(model=model)
    outputs = llm.generate("Hello, my name is")
    assert [prompt for prompt, _ in shown(outputs)] == ["Hello, my name is"]
    assert 1 <= len(outputs[0].outputs[0].token_ids) <= 16

    params = SamplingParams(temperature=0)
    outputs = llm.generate("Hello, my name is", params)
    tokenizer = llm.get_tokenizer()
    expected = oracle(Path(model), tokenizer.encode("Hello, my name is"), max_tokens=16)
    assert shown(outputs) == [("Hello, my name is", tokenizer.decode(expected, skip_special_tokens=True))]


def test_generative_page_beam_search(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    model = make_model("llama")
    llm = llms(model=model)
    params = BeamSearchParams(beam_width=5, max_tokens=50)
    outputs = llm.generate("Hello, my name is", params)
    ids = llm.get_tokenizer().encode("Hello, my name is")
    with torch.inference_mode():
        expected = load_oracle(Path(model)).generate(
            torch.tensor([ids]), num_beams=5, max_new_tokens=50, do_sample=False, num_return_sequences=5
        )
    best = expected[0, len(ids) :].tolist()
    assert outputs[0].outputs[0].token_ids == best[: len(outputs[0].outputs[0].token_ids)]
    (beams,) = llm.beam_search(["Hello, my name is"], params)
    assert len(beams.sequences) == 5
    assert beams.sequences[0].tokens == [*ids, *outputs[0].outputs[0].token_ids]
    assert beams.sequences[0].text == "Hello, my name is" + outputs[0].outputs[0].text


CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {
        "role": "user",
        "content": "Write an essay about the importance of higher education.",
    },
]


def test_generative_page_chat(chat_model: str, llms: Callable[..., LLM], tmp_path: Path) -> None:
    from trivium.chat_utils import load_chat_template

    llm, greedy = llms(model=chat_model), SamplingParams(temperature=0)
    outputs = llm.chat(CONVERSATION, greedy)
    rendered = "".join(f"<{message['role']}>{message['content']}" for message in CONVERSATION) + "<a>"
    tokenizer = llm.get_tokenizer()
    expected = oracle(Path(chat_model), tokenizer.encode(rendered), max_tokens=16)
    assert shown(outputs) == [(rendered, tokenizer.decode(expected, skip_special_tokens=True))]

    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    custom_template = load_chat_template(chat_template=str(path))
    assert custom_template == path.read_text() == load_chat_template(path.read_text())
    outputs = llm.chat(CONVERSATION, chat_template=custom_template)
    assert outputs[0].prompt == "".join(f"[{message['content']}]" for message in CONVERSATION)
    with pytest.raises(InvalidRequestError, match="neither a template nor a file"):
        load_chat_template(str(tmp_path / "missing"))


# --- offline API (TACO-LLM) ---


def test_offline_page_constructor(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    """Every argument of the page with its default, by name; `swap_space` of 4 GiB is host memory, taken when used."""
    llm = llms(
        model=make_model("llama"),
        tokenizer=None,
        tokenizer_mode="auto",
        skip_tokenizer_init=False,
        trust_remote_code=False,
        tensor_parallel_size=1,
        dtype="auto",
        quantization=None,
        revision=None,
        tokenizer_revision=None,
        seed=0,
        gpu_memory_utilization=0.9,
        swap_space=1,
        cpu_offload_gb=0,
        enforce_eager=None,
        max_context_len_to_capture=None,
        max_seq_len_to_capture=8192,
        disable_custom_all_reduce=False,
        disable_async_output_proc=False,
    )
    assert llm.model_info.num_host_blocks > 0
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].finished
    with pytest.raises(ConfigurationError, match="tensor_parallel_size 3 is not a multiple of the model's 2 key heads"):
        LLM(model="trivium-chat", tensor_parallel_size=3)


def test_offline_page_generate(make_model: MakeModel, llms: Callable[..., LLM]) -> None:
    llm, greedy = llms(model=make_model("llama")), SamplingParams(temperature=0, max_tokens=4)
    tokenizer = llm.get_tokenizer()
    ids = [tokenizer.encode(text) for text in ("Hello", "you")]
    expected = llm.generate(["Hello", "you"], greedy)
    tokens = [output.outputs[0].token_ids for output in expected]
    for outputs in (
        llm.generate(None, greedy, ids),
        llm.generate(prompt_token_ids=ids, sampling_params=[greedy, greedy], use_tqdm=False),
        llm.generate(["Hello", "you"], greedy, ids, False, None, None, None),
        llm.generate(inputs=["Hello", "you"], sampling_params=greedy, lora_request=[None, None]),
    ):
        assert [output.outputs[0].token_ids for output in outputs] == tokens
    assert llm.generate(prompt_token_ids=ids[0], sampling_params=greedy)[0].outputs == expected[0].outputs
    assert [output.prompt for output in llm.generate(["Hello", "you"], greedy, ids)] == ["Hello", "you"]


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"lora_request": object()}, "lora_request"),
        ({"lora_request": [None, object()]}, "lora_request"),
        ({"prompt_adapter_request": object()}, "prompt_adapter_request"),
        ({"prompt_token_ids": [[5], [6]]}, "prompt_token_ids"),
        ({"inputs": "both"}, "inputs"),
    ],
)
def test_offline_page_what_is_not_there_is_refused_by_name(
    bundled_llm: LLM, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        bundled_llm.generate("Hello", **arguments)
    assert refused.value.param == param and param in refused.value.message


def test_offline_page_guided_options_have_one_kind(bundled_llm: LLM) -> None:
    for options in ({}, {"guided_json": {}, "guided_regex": "a"}):
        with pytest.raises(InvalidRequestError, match="exactly one"):
            LLMGuidedOptions(**options)  # type: ignore[arg-type]
    choice = LLMGuidedOptions(guided_choice=["yes", "no"])
    (output,) = bundled_llm.generate("Hello", SamplingParams(temperature=0), guided_options_request=choice)
    assert output.outputs[0].text in ("yes", "no")
    for wrong in ("yes|no", [choice], {"guided_choice": ["yes"]}):
        with pytest.raises(InvalidRequestError, match="not LLMGuidedOptions") as refused:
            bundled_llm.generate("Hello", guided_options_request=wrong)  # type: ignore[arg-type]
        assert refused.value.param == "guided_options_request"


@pytest.fixture(scope="module")
def bundled_llm() -> Iterator[LLM]:
    with LLM("trivium-chat", num_threads=1) as llm:
        yield llm
