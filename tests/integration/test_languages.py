"""The bundled translator told its language by code: over REST, over gRPC and offline."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest

from cluster import ROOT, Cluster
from trivium import LLM, ExplicitEncoderDecoderPrompt, TextPrompt, TokensPrompt
from trivium.errors import InvalidRequestError
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("bundled")

EXAMPLES = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "text-tasks.md").read_text(), flags=re.DOTALL)


def post(cluster: Cluster, path: str, body: object) -> Any:
    request = urllib.request.Request(
        f"{cluster.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)


@pytest.mark.parametrize(("position", "path"), [(0, "translations"), (2, "summarizations"), (4, "completions")])
def test_the_examples_of_the_documentation_are_true(bundled: Cluster, position: int, path: str) -> None:
    request, response = (json.loads(text) for text in EXAMPLES[position : position + 2])
    answer = post(bundled, path, request)
    for varying in ("id", "created"):
        assert type(answer.pop(varying)) is type(response.pop(varying))
    assert answer == response


def test_a_language_that_the_translator_does_not_have_is_refused(bundled: Cluster) -> None:
    body = {"model": "trivium-translate", "input": "one", "target_language": "it"}
    error = post(bundled, "translations", body)["error"]
    assert (error["param"], error["code"]) == ("target_language", "unknown_language") and "es" in error["message"]


def test_direct_stubs_name_languages_and_get_the_defaults_of_the_checkpoint(bundled: Cluster) -> None:
    argv = next(
        process.cmdline()
        for name, process in bundled.children().items()
        if "scheduler" in name and "trivium-translate" in process.cmdline()
    )
    text = types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text="half past four"))
    prompt = types_pb2.Prompt(single=text, source_language="en", target_language="de-DE")
    with grpc.insecure_channel(argv[argv.index("--listen") + 1]) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        responses = stub.Generate(scheduler_pb2.GenerateRequest(prompt=prompt), timeout=30)
        assert "".join(response.delta.text for response in responses) == "halb fünf"
        info = stub.GetModelInfo(scheduler_pb2.GetModelInfoRequest(), timeout=30)
        assert info.generation_defaults.max_new_tokens == 96
        prompt.target_language = "klingon"
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.Generate(scheduler_pb2.GenerateRequest(prompt=prompt), timeout=30))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_offline_prompts_name_languages() -> None:
    with LLM("trivium-translate", num_threads=1) as llm:
        prompts = [
            TextPrompt(prompt="half past four", target_language="de"),
            ExplicitEncoderDecoderPrompt(encoder_prompt="half past four", decoder_prompt=None, target_language="es"),
            TokensPrompt(prompt_token_ids=llm.get_tokenizer().encode("half past four"), target_language="fr"),
            ExplicitEncoderDecoderPrompt(
                encoder_prompt="half past four", decoder_prompt="halb", target_language="de-AT"
            ),
        ]
        texts = [output.outputs[0].text for output in llm.generate(prompts, use_tqdm=False)]
        assert texts == ["halb fünf", "las cuatro y media", "quatre heures et demie", " fünf"]
        with pytest.raises(InvalidRequestError, match="'it' is not a language of this model; it has de, es, fr"):
            llm.generate(TextPrompt(prompt="one", target_language="it"))
