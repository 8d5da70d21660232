"""The examples of docs/prompt-embeds.md run, and those of clients made for vLLM."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

import trivium
from cluster import ROOT, Cluster, environment, serve
from trivium import LLM

pytestmark = pytest.mark.xdist_group("bundled")

PAGE = (ROOT / "docs" / "prompt-embeds.md").read_text()
OFFLINE, ONLINE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
NAME = "meta-llama/Llama-3.2-1B-Instruct"
MODEL = Path(trivium.__file__).parent / "demo" / "trivium_chat"
QUESTION = [{"role": "user", "content": "what is 3 plus 4?"}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serve(str(MODEL), "--enable-prompt-embeds", log=tmp_path_factory.mktemp("page") / "serve.log") as cluster:
        yield cluster


def run(code: str) -> list[str]:
    assert NAME in code
    command = [sys.executable, "-P", "-c", code.replace(NAME, str(MODEL))]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What the model says to the messages of the page, given as text."""
    with LLM(str(MODEL), num_threads=1) as llm:
        prompts = [[{"role": "user", "content": "hello"}], QUESTION]
        ids = [llm.render_chat(messages) for messages in prompts]
        outputs = llm.generate([{"prompt_token_ids": part} for part in ids], use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.timeout(120)
def test_the_offline_example_says_what_the_text_says(answers: list[str]) -> None:
    assert run(OFFLINE) == [line for answer in answers for line in answer.splitlines()]


@pytest.mark.timeout(120)
def test_the_online_example_says_what_the_text_says(cluster: Cluster) -> None:
    lines = run(ONLINE.replace("127.0.0.1:8000", f"127.0.0.1:{cluster.port}"))
    with openai.OpenAI(base_url=cluster.url, api_key="none") as client:
        chat: Any = client.chat.completions.create(
            model=str(MODEL),
            messages=QUESTION,
            temperature=0,
            max_tokens=20,  # type: ignore[arg-type]
        )
    assert lines == [chat.choices[0].message.content]


def test_a_program_for_vllm_runs_with_another_import_and_address(cluster: Cluster) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    table = transformers.AutoModelForCausalLM.from_pretrained(MODEL).get_input_embeddings()
    token_ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    prompt_embeds = table(token_ids["input_ids"]).squeeze(0)

    llm = LLM(model=str(MODEL), enable_prompt_embeds=True)
    try:
        single = llm.generate({"prompt_embeds": prompt_embeds})
        batch = llm.generate([{"prompt_embeds": prompt_embeds} for _ in range(3)])
    finally:
        llm.close()
    assert [output.outputs[0].text != "" for output in (*single, *batch)] == [True] * 4

    buffer = io.BytesIO()
    torch.save(prompt_embeds, buffer)
    buffer.seek(0)
    encoded_embeds = base64.b64encode(buffer.read()).decode("utf-8")
    client = openai.OpenAI(api_key="EMPTY", base_url=cluster.url)
    completion = client.completions.create(
        model=str(MODEL), prompt="", max_tokens=5, temperature=0.0, extra_body={"prompt_embeds": encoded_embeds}
    )
    beside = client.chat.completions.create(
        model=str(MODEL),
        messages=QUESTION,
        max_tokens=5,
        temperature=0.0,  # type: ignore[arg-type]
    )
    client.close()
    assert completion.choices[0].text == beside.choices[0].message.content != ""
