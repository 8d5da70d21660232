"""The bundled models say true things, through our own engine, about questions that were not in their training."""

from __future__ import annotations

from collections import Counter

import openai
import pytest

from cluster import Cluster
from trivium import LLM, ExplicitEncoderDecoderPrompt, SamplingParams, TokensPrompt
from trivium.demo import dialogue_corpus, translation_corpus

pytestmark = pytest.mark.xdist_group("bundled")
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def misses(pairs: list[tuple[str, str, str]]) -> str:
    """A short table of (category, expected, said) that differ."""
    wrong = [pair for pair in pairs if pair[1] != pair[2]]
    return f"{Counter(category for category, _, _ in wrong)}, for example {wrong[:5]}"


def test_the_translator_is_right_on_held_out_phrases() -> None:
    items = translation_corpus.held_out()
    prompts = [
        ExplicitEncoderDecoderPrompt(encoder_prompt=item.source, decoder_prompt=f"<{item.language}>") for item in items
    ]
    with LLM("trivium-translate", num_threads=1) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    said = [(item.category, item.target, output.outputs[0].text) for item, output in zip(items, outputs, strict=True)]
    right = sum(expected == text for _, expected, text in said)
    assert len(items) >= 400 and right >= 0.95 * len(items), f"{right} of {len(items)}; {misses(said)}"


def test_the_chat_model_is_right_on_held_out_questions() -> None:
    items = dialogue_corpus.held_out()
    with LLM("trivium-chat", num_threads=1) as llm:
        prompts = [TokensPrompt(prompt_token_ids=llm.render_chat(item.messages)) for item in items]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    said = [(item.category, item.answer, output.outputs[0].text) for item, output in zip(items, outputs, strict=True)]
    right = sum(expected == text for _, expected, text in said)
    assert len(items) >= 400 and right >= 0.90 * len(items), f"{right} of {len(items)}; {misses(said)}"


def test_serve_without_arguments_serves_both(bundled: Cluster) -> None:
    with openai.OpenAI(base_url=bundled.url, api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"trivium-chat", "trivium-translate"}
        answer = client.chat.completions.create(
            model="trivium-chat", messages=[{"role": "user", "content": "What is 7 plus 5?"}], temperature=0
        )
        assert answer.choices[0].message.content == "7 plus 5 is 12."
        assert answer.choices[0].finish_reason == "stop"


def test_a_follow_up_question_uses_the_dialogue(bundled: Cluster) -> None:
    with openai.OpenAI(base_url=bundled.url, api_key="none", max_retries=0) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [
            {"role": "user", "content": "What is 7 plus 5?"},
            {"role": "assistant", "content": "7 plus 5 is 12."},
            {"role": "user", "content": "And 5 plus 6?"},
        ]
        answer = client.chat.completions.create(model="trivium-chat", messages=messages, temperature=0)
        assert answer.choices[0].message.content == "5 plus 6 is 11."
