"""What rows report of their tokens, which rows do, and what the others pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import load_oracle, save_tiny
from trivium.executor import logprobs
from trivium.executor.logprobs import token_logprobs
from unit.executor.mini_scheduler import GREEDY, MiniRequest, MiniScheduler
from unit.executor.test_models import make_runner, random_ids


def test_numbers_are_those_of_log_softmax_and_each_row_has_its_own_count() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(40, 300)
    token_ids = np.random.default_rng(0).integers(0, 300, 40)
    num_top = [index % 6 for index in range(40)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, value in enumerate(token_logprobs(logits, token_ids, num_top)):
        order = expected[row].sort(descending=True)
        assert value.logprob == pytest.approx(expected[row, token_ids[row]].item(), abs=1e-5)
        assert order.indices[value.rank - 1] == token_ids[row]
        assert list(value.top_ids) == order.indices[: num_top[row]].tolist()
        assert value.top_logprobs == pytest.approx(order.values[: num_top[row]].tolist(), abs=1e-5)


def test_equal_tokens_share_a_rank_and_a_small_vocabulary_is_reported_whole() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -torch.inf]])
    values = [token_logprobs(logits, np.array([token_id]), [20])[0] for token_id in range(4)]
    assert [value.rank for value in values] == [3, 1, 1, 4]
    assert len(values[0].top_ids) == 4
    assert values[3].logprob == values[0].top_logprobs[3] == -float("inf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_only_rows_that_ask_report(llama: Path) -> None:
    scheduler = MiniScheduler(make_runner(llama), chunk=4)
    settings = [{}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"prompt_logprobs": 1, "temperature": 1.0, "seed": 3}]
    requests = [
        scheduler.add(random_ids(10, seed=index), replace(GREEDY, **fields), choice_index=index // 3)  # type: ignore[arg-type]
        for index, fields in enumerate(settings)
    ]
    outputs = [scheduler.step()]
    slots = [request.slot for request in requests]
    while scheduler.running:
        outputs.append(scheduler.step())
    sampled = [(item.slot, item.sampled) for output in outputs for item in output.logprobs if item.sampled is not None]
    prompts = [
        (item.slot, item.prompt_start, len(item.prompt))
        for output in outputs
        for item in output.logprobs
        if item.prompt
    ]
    assert [slot for slot, _ in sampled] == [slots[1]] * len(requests[1].output)
    assert all(len(value.top_ids) == 2 for _, value in sampled)
    assert prompts == [
        (slots[2], 1, 4),
        (slots[2], 5, 4),
        (slots[2], 9, 1),
    ]  # of 10 tokens in chunks of 4; choice 1: none


def test_a_row_that_nobody_asks_about_computes_no_extra_logits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "token_logprobs", None)
    scheduler = MiniScheduler(make_runner(llama))
    scheduler.add(random_ids(10))
    while scheduler.running or scheduler.waiting:
        assert scheduler.step().logprobs == ()


def test_logits_of_a_prompt_are_computed_in_pieces(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "PIECE_ROWS", 7)
    runner = make_runner(llama)
    decoder, sizes = runner._model.decoder, []
    compute = decoder.compute_logits
    monkeypatch.setattr(decoder, "compute_logits", lambda hidden: sizes.append(len(hidden)) or compute(hidden))
    scheduler = MiniScheduler(runner)
    prompt = random_ids(40)
    scheduler.add(prompt, replace(GREEDY, prompt_logprobs=0, max_tokens=1))
    (item,) = scheduler.step().logprobs
    assert sizes == [7, 7, 7, 7, 7, 4, 1]
    with torch.no_grad():
        table = torch.log_softmax(load_oracle(llama)(input_ids=torch.tensor([prompt])).logits[0].double(), dim=-1)
    expected = [table[index, token_id].item() for index, token_id in enumerate(prompt[1:])]
    assert [value.logprob for value in item.prompt] == pytest.approx(expected, abs=1e-4)


def test_resumed_output_is_no_prompt(llama: Path) -> None:
    scheduler = MiniScheduler(make_runner(llama), chunk=5)
    request: MiniRequest = scheduler.add(
        random_ids(8), replace(GREEDY, prompt_logprobs=0), output=random_ids(6, seed=9)
    )
    positions = []
    while scheduler.running or scheduler.waiting:
        for item in scheduler.step().logprobs:
            positions += range(item.prompt_start, item.prompt_start + len(item.prompt))
    assert positions == list(range(1, 8)) and len(request.output) == 12
