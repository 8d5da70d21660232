"""The rest of `LLM`: chats, engines without a tokenizer, settings that reach the engine, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from oracle import oracle
from tiny import save_tiny
from trivium import LLM, BeamSearchParams, SamplingParams, TokensPrompt
from trivium.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}{{ mood or '' }}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
HI: Any = [{"role": "user", "content": "hi"}]
BYE: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
CONTINUED: Any = [*HI, {"role": "assistant", "content": "well"}]


@pytest.fixture(scope="module")
def chat_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = save_tiny("llama", tmp_path_factory.mktemp("chat"), with_tokenizer=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    with LLM(str(path), num_threads=1, scheduling_policy="priority") as llm:
        yield llm


@pytest.mark.parametrize(
    ("messages", "settings", "rendered"),
    [
        (HI, {}, ["<user>hi<a>"]),
        ([HI, BYE], {}, ["<user>hi<a>", "<user>a\nb<a>"]),
        (HI, {"add_generation_prompt": False}, ["<user>hi"]),
        (CONTINUED, {"add_generation_prompt": False, "continue_final_message": True}, ["<user>hi<assistant>well"]),
        (HI, {"tools": [TOOL]}, ["[look_up]<user>hi<a>"]),
        (HI, {"chat_template_kwargs": {"mood": "!"}}, ["<user>hi<a>!"]),
        ([HI, BYE], {"chat_template": PARTS}, ["(hi)", "(a)(b)"]),
        (HI, {"chat_template_content_format": "openai"}, ["<user>[{'type': 'text', 'text': 'hi'}]<a>"]),
        (BYE, {"chat_template": PARTS, "chat_template_content_format": "openai"}, ["(a)(b)"]),
    ],
)
def test_a_chat_is_what_the_template_makes_of_it(
    chat_llm: LLM, messages: Any, settings: dict[str, Any], rendered: list[str]
) -> None:
    outputs = chat_llm.chat(messages, GREEDY, use_tqdm=False, **settings)
    assert [output.prompt for output in outputs] == rendered
    plain = chat_llm.generate(rendered, GREEDY, use_tqdm=False)
    assert [output.outputs for output in outputs] == [output.outputs for output in plain]


@pytest.mark.parametrize(
    ("messages", "settings", "match"),
    [
        ([], {}, "messages"),
        ("hi", {}, "messages"),
        ([{"content": "hi"}], {}, "role"),
        (HI, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (HI, {"chat_template_content_format": "xml"}, "chat_template_content_format"),
        (HI, {"continue_final_message": True}, "continue_final_message"),
        (HI, {"lora_request": object()}, "lora_request"),
    ],
)
def test_a_bad_chat_is_refused(chat_llm: LLM, messages: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        chat_llm.chat(messages, GREEDY, use_tqdm=False, **settings)


def test_a_chat_with_an_encoder_decoder_model_is_its_last_question(checkpoints: dict[str, Path]) -> None:
    with LLM(str(checkpoints["t5"]), num_threads=1) as llm:
        (plain,) = llm.generate("a\nb", GREEDY, use_tqdm=False)
        (chat,) = llm.chat([*HI, *BYE], GREEDY, use_tqdm=False)
        assert (chat.encoder_prompt, chat.outputs) == ("a\nb", plain.outputs)
        (continued,) = llm.chat(CONTINUED, GREEDY, use_tqdm=False, continue_final_message=True)
        assert (continued.encoder_prompt, continued.prompt) == ("hi", "well")
        with pytest.raises(InvalidRequestError, match="takes no tools"):
            llm.chat(HI, GREEDY, use_tqdm=False, tools=[TOOL])


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_without_a_tokenizer_ids_go_in_and_ids_come_out(tmp_path: Path, family: str) -> None:
    path, ids = save_tiny(family, tmp_path / family), [5, 6, 7, 8]
    with LLM(str(path), skip_tokenizer_init=True, num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)
        choice = output.outputs[0]
        assert choice.token_ids == oracle(path, ids, max_tokens=8) and choice.text == "" and output.prompt is None
        assert choice.logprobs and {item.decoded_token for item in choice.logprobs[0].values()} == {None}
        (beams,) = llm.generate(
            prompt_token_ids=ids, sampling_params=BeamSearchParams(beam_width=2, max_tokens=4), use_tqdm=False
        )
        assert beams.outputs[0].token_ids and beams.outputs[0].text == ""
        for prompt, bad, match in (
            ("text", GREEDY, "skip_tokenizer_init"),
            (TokensPrompt(prompt_token_ids=ids), SamplingParams(stop=["a"]), "stop_token_ids"),
            (TokensPrompt(prompt_token_ids=ids), SamplingParams(bad_words=["a"]), "skip_tokenizer_init"),
        ):
            with pytest.raises(InvalidRequestError, match=match):
                llm.generate(prompt, bad, use_tqdm=False)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_a_prompt_is_cut_to_its_end_or_its_beginning(chat_llm: LLM) -> None:
    ids = list(range(5, 25))
    for given, kept in (
        ({"truncate_prompt_tokens": 4}, ids[-4:]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, ids[:4]),
        ({"truncate_prompt_tokens": 20}, ids),
        ({"truncate_prompt_tokens": 10_000}, ids),
        ({"truncate_prompt_tokens": -1, "max_tokens": 120}, ids[-8:]),
    ):
        params = SamplingParams(temperature=0, **{"max_tokens": 2, **given})
        (output,) = chat_llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
        assert output.prompt_token_ids == kept


def test_settings_of_the_constructor_reach_the_engine(checkpoints: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"max_logprobs": 1, "async_scheduling": False, "block_size": 8, "max_num_queued_reqs": 2}
    override = {"max_new_tokens": 3, "temperature": 0.0}
    with LLM(str(checkpoints["llama"]), num_threads=1, override_generation_config=override, **settings) as llm:
        assert len(llm.generate("Hello", use_tqdm=False)[0].outputs[0].token_ids) <= 3
        assert llm.get_default_sampling_params().temperature == 0.0
        assert llm.model_info.block_size == 8
        with pytest.raises(InvalidRequestError, match="max_logprobs"):
            llm.generate("Hello", SamplingParams(logprobs=2), use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="scheduling policy"):
            llm.generate("Hello", priority=[1], use_tqdm=False)


def test_priorities_decide_who_runs_first(chat_llm: LLM) -> None:
    outputs = chat_llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[5, -5])
    assert [output.prompt for output in outputs] == ["a", "b"]
    with pytest.raises(InvalidRequestError, match="2 prompts but 1 priority"):
        chat_llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1])


def test_the_progress_bar_counts_tokens_in_and_out(chat_llm: LLM) -> None:
    bars: list[Any] = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    chat_llm.generate(["Hello", "you"], GREEDY, use_tqdm=Recorded)
    (bar,) = bars
    assert (bar.total, bar.n) == (2, 2)
    speeds = [float(part.split(" toks/s")[0]) for part in str(bar.postfix).replace("output", "").split(": ")[1:]]
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert bar.postfix.startswith("est. speed input: ") and ", output: " in bar.postfix


def test_a_copy_of_the_tokenizer_can_be_changed(chat_llm: LLM) -> None:
    tokenizer = chat_llm.get_tokenizer()
    tokenizer.add_tokens(["Hello"])
    assert len(tokenizer.encode("Hello")) == 1
    assert len(chat_llm.generate("Hello", GREEDY, use_tqdm=False)[0].prompt_token_ids) == 5
