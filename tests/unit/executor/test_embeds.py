"""Embeddings in place of tokens, against transformers' `inputs_embeds`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from embeds import embed, generate_from, packed, soft_rows
from tiny import BART_LIKE, DECODER_ONLY, T5_LIKE, load_oracle, save_tiny
from trivium.embeds import PromptEmbeds
from trivium.executor.plan_check import PlanError
from trivium.executor.prompt_lookup import find_draft
from trivium.executor.slot_embeds import SlotEmbeds
from trivium.params import SamplingParams
from trivium.step import NewRequestData, SchedulerOutput
from unit.executor.mini_scheduler import GREEDY, MiniRequest, MiniScheduler
from unit.executor.parity import generate, make_runner, random_ids, record_logits

pytestmark = pytest.mark.filterwarnings("ignore:Passing `")  # transformers says what the tests rely on
GRAPHS = ("llama", "bart", "t5")
SOURCE = [0, *random_ids(20, seed=4), 0]  # with padding tokens, whose place some families give away


@pytest.fixture(scope="module", params=sorted({*DECODER_ONLY, *BART_LIKE, *T5_LIKE}))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param), seed=3)


def add(scheduler: MiniScheduler, rows: torch.Tensor, sampling: SamplingParams = GREEDY) -> MiniRequest:
    """A request with `rows` for its prompt or encoder input."""
    embeds = packed(rows)
    if scheduler.info.is_encoder_decoder:
        start = scheduler.info.decoder_start_token_id
        assert start is not None
        return scheduler.add([start], sampling, encoder=embeds.placeholder_ids, encoder_embeds=embeds)
    return scheduler.add(list(embeds.placeholder_ids), sampling, embeds=embeds)


@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_output_equals_transformers_in_a_batch_with_tokens(checkpoint: Path, chunk: int | None) -> None:
    oracle, scheduler = load_oracle(checkpoint), MiniScheduler(make_runner(checkpoint), chunk=chunk)
    rows = [soft_rows(oracle, SOURCE[: 2 + 9 * index], seed=index) for index in range(3)]
    requests = [add(scheduler, part) for part in rows]
    ids = random_ids(13, seed=9)
    start = scheduler.info.decoder_start_token_id or 0
    tokens = scheduler.add([start], encoder=tuple(ids)) if oracle.config.is_encoder_decoder else scheduler.add(ids)
    scheduler.run()
    expected = [generate_from(checkpoint, part, max_new_tokens=GREEDY.max_tokens) for part in rows]
    assert [request.output for request in requests] == expected
    assert tokens.output == generate(oracle, tokens)
    assert len({tuple(output) for output in expected}) > 1


def test_logits_equal_transformers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, scheduler = load_oracle(checkpoint), MiniScheduler(make_runner(checkpoint))
    recorded = record_logits(monkeypatch)
    rows = soft_rows(oracle, SOURCE)
    request = add(scheduler, rows)
    scheduler.run()
    output = request.output[:-1]
    with torch.no_grad():
        if oracle.config.is_encoder_decoder:
            decoder = torch.tensor([[*request.prompt, *output]])
            expected = oracle(inputs_embeds=rows[None], decoder_input_ids=decoder).logits[0]
        else:
            both = torch.cat((rows, embed(oracle, output)))
            expected = oracle(inputs_embeds=both[None]).logits[0, len(rows) - 1 :]
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", GRAPHS)
def test_embeddings_of_tokens_give_what_the_tokens_give(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    oracle, runner = load_oracle(path), make_runner(path)
    ids = random_ids(19)
    scheduler = MiniScheduler(runner)
    request = add(scheduler, embed(oracle, ids))
    start = scheduler.info.decoder_start_token_id or 0
    tokens = scheduler.add([start], encoder=tuple(ids)) if oracle.config.is_encoder_decoder else scheduler.add(ids)
    scheduler.run()
    assert request.output == tokens.output


@pytest.mark.parametrize("family", GRAPHS)
def test_a_preempted_row_gets_its_embeddings_again(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path), chunk=4)
    rows = soft_rows(oracle, SOURCE)
    request = add(scheduler, rows)
    for num_steps in (2, 7):  # within the prompt, and after it
        for _ in range(num_steps):
            scheduler.step()
        scheduler.preempt(request)
    scheduler.run()
    assert request.output == generate_from(path, rows, max_new_tokens=GREEDY.max_tokens)


PENALTIES = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"bad_words_token_ids": ((7, 8), (9,))},
]


@pytest.mark.parametrize("settings", PENALTIES)
def test_penalties_count_the_output_alone_as_in_transformers(settings: dict[str, object], tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path, seed=5)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
    rows = soft_rows(oracle, random_ids(9))
    sampling = replace(GREEDY, max_tokens=24, ignore_eos=True, **settings)  # type: ignore[arg-type]
    request = add(scheduler, rows, sampling)
    beside = scheduler.add(random_ids(30), sampling)
    scheduler.run()
    theirs = dict(settings)
    words = theirs.pop("bad_words_token_ids", None)
    if words is not None:
        theirs["bad_words_ids"] = [list(word) for word in words]  # type: ignore[attr-defined]
    limits = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    assert request.output == generate_from(path, rows, **limits, **theirs)
    assert len(beside.output) == 24


def test_dry_and_output_penalties_never_see_placeholders(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path, seed=5)
    oracle = load_oracle(path)
    rows = soft_rows(oracle, random_ids(9))
    sampling = replace(GREEDY, ignore_eos=True, dry_multiplier=2.0, frequency_penalty=0.5, presence_penalty=0.5)
    outputs = []
    for others in (0, 2):
        scheduler = MiniScheduler(make_runner(path))
        request = add(scheduler, rows, sampling)
        for index in range(others):
            scheduler.add(random_ids(20, seed=index), sampling)
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1] and len(outputs[0]) == 12


@pytest.mark.parametrize("settings", [{"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 2}])
def test_parameters_that_read_the_encoder_input_find_nothing_in_embeddings(
    settings: dict[str, float], tmp_path: Path
) -> None:
    path = save_tiny("bart", tmp_path)
    oracle = load_oracle(path)
    rows = soft_rows(oracle, SOURCE)
    outputs = []
    for sampling in (GREEDY, replace(GREEDY, **settings)):
        scheduler = MiniScheduler(make_runner(path))
        request = add(scheduler, rows, sampling)
        scheduler.add([2], sampling, encoder=tuple(random_ids(8)))
        scheduler.run()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


FRONT, BACK = random_ids(6, seed=1), random_ids(5, seed=2)


def mixed(oracle: PreTrainedModel, rows: torch.Tensor) -> tuple[list[int], PromptEmbeds, torch.Tensor]:
    """Tokens, rows, tokens, one row: ids with placeholders, the rows in their places, and all of it as embeddings."""
    ids = [*FRONT, *[0] * len(rows), *BACK, 0]
    end = len(FRONT) + len(rows)
    embeds = packed(torch.cat((rows, rows[:1]))).at(((len(FRONT), end), (len(ids) - 1, len(ids))))
    return ids, embeds, torch.cat((embed(oracle, FRONT), rows, embed(oracle, BACK), rows[:1]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_embeddings_in_the_middle_of_a_prompt(family: str, chunk: int | None, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, seed=3)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path), chunk=chunk)
    ids, embeds, whole = mixed(oracle, soft_rows(oracle, SOURCE))
    request, beside = scheduler.add(ids, embeds=embeds), scheduler.add(random_ids(9))
    for num_steps in (2, 7):
        for _ in range(num_steps):
            scheduler.step()
        scheduler.preempt(request)
    scheduler.run()
    assert request.output == generate_from(path, whole, max_new_tokens=GREEDY.max_tokens)
    assert beside.output == generate(oracle, beside)


def test_an_encoder_input_of_tokens_and_embeddings(tmp_path: Path) -> None:
    for family in ("bart", "t5"):
        path = save_tiny(family, tmp_path / family, seed=3)
        oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path))
        ids, embeds, whole = mixed(oracle, soft_rows(oracle, SOURCE))
        start = scheduler.info.decoder_start_token_id
        assert start is not None
        request = scheduler.add([start], encoder=tuple(ids), encoder_embeds=embeds)
        scheduler.run()
        assert request.output == generate_from(path, whole, max_new_tokens=GREEDY.max_tokens)


@pytest.mark.parametrize("family", sorted({*BART_LIKE, "t5", "umt5"}))
def test_a_decoder_prompt_of_embeddings_behind_the_start_token(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny(family, tmp_path, seed=3)
    oracle, scheduler = load_oracle(path), MiniScheduler(make_runner(path), chunk=3)
    recorded = record_logits(monkeypatch)
    start, source = scheduler.info.decoder_start_token_id, random_ids(12)
    assert start is not None
    rows = soft_rows(oracle, random_ids(7, seed=5))
    embeds = packed(rows).at(((1, 8),))
    request = scheduler.add([start, *[0] * 7], encoder=tuple(source), embeds=embeds)
    scheduler.run()
    table = oracle.get_decoder().embed_tokens  # where a decoder scales, it scales what it is given, too
    with torch.no_grad():
        known = [table(torch.tensor(part)) for part in ([start], request.output[:-1])]
        decoder = torch.cat((known[0], rows, known[1]))
        expected = oracle(input_ids=torch.tensor([source]), decoder_inputs_embeds=decoder[None]).logits[0, len(rows) :]
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=0)


def test_penalties_count_the_tokens_of_a_prompt_and_not_its_embeddings(tmp_path: Path) -> None:
    """Whatever the rows are, and whatever id stands in their place, the same tokens are penalised."""
    path = save_tiny("llama", tmp_path, seed=5)
    oracle = load_oracle(path)
    rows = soft_rows(oracle, random_ids(4))
    sampling = replace(GREEDY, ignore_eos=True, max_tokens=20)
    ids, embeds, whole = mixed(oracle, rows)
    front = [*generate_from(path, whole, max_new_tokens=1), *FRONT[1:]]
    ids = [*front, *ids[6:]]
    outputs = {}
    for name, settings in {
        "n-gram": {"no_repeat_ngram_size": 1},
        "bias": {"logit_bias": dict.fromkeys({*front, *BACK}, -100.0)},
    }.items():
        scheduler = MiniScheduler(make_runner(path))
        request = scheduler.add(ids, replace(sampling, **settings), embeds=embeds)  # type: ignore[arg-type]
        scheduler.run()
        outputs[name] = request.output
    assert not {*front, *BACK} & set(outputs["n-gram"]) and len(set(outputs["n-gram"])) == 20
    assert outputs["n-gram"][0] == outputs["bias"][0]


def test_drafts_pass_over_embeddings(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path, seed=5)
    oracle = load_oracle(path)
    ids, embeds, whole = mixed(oracle, soft_rows(oracle, SOURCE))
    expected = generate_from(path, whole, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    sampling = replace(GREEDY, ignore_eos=True, max_tokens=40)
    scheduler = MiniScheduler(make_runner(path))
    request = scheduler.add(ids, sampling, embeds=embeds)
    scheduler.run()
    assert request.output == expected
    drafts = find_draft([np.array([5, 6, -1, -1, 7, 5, 6])], 4)
    assert drafts.tolist() == [] and find_draft([np.array([5, 6, 8, -1, 7, 5, 6])], 4).tolist() == [8]
    assert find_draft([np.array([-1, -1, 4, -1])], 4).tolist() == []


def new_request(**fields: object) -> NewRequestData:
    defaults: dict[str, object] = {
        "slot": 0,
        "prompt_token_ids": (0, 0, 0),
        "output_token_ids": (),
        "num_computed_tokens": 1,
        "block_ids": (1,),
        "sampling": GREEDY,
        "choice_index": 0,
        "max_tokens": 4,
        "prompt_embeds": bytes(2 * 48 * 4),
        "prompt_places": ((0, 3),),
    }
    return NewRequestData(**{**defaults, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("num_bytes", [0, 4, 48 * 4, 3 * 48 * 4])
def test_a_plan_with_too_few_or_too_many_embeddings_is_refused(num_bytes: int, tmp_path: Path) -> None:
    runner = make_runner(save_tiny("llama", tmp_path))
    plan = SchedulerOutput(1, (0,), (2,), (new_request(),))
    assert runner.execute(plan).slots == (0,)
    runner.reset()
    wrong = SchedulerOutput(1, (0,), (2,), (new_request(prompt_embeds=bytes(num_bytes)),))
    with pytest.raises(PlanError, match="bytes of prompt embeddings"):
        runner.execute(wrong)


def test_an_encoder_run_without_its_embeddings_is_refused(tmp_path: Path) -> None:
    runner = make_runner(save_tiny("bart", tmp_path))
    new = new_request(
        prompt_token_ids=(2,),
        num_computed_tokens=0,
        prompt_embeds=None,
        prompt_places=(),
        encoder_token_ids=(0, 0),
        encoder_embeds=b"",
        encoder_places=((0, 2),),
        cross_block_ids=(2,),
    )
    with pytest.raises(PlanError, match="embeddings are missing"):
        runner.execute(SchedulerOutput(1, (0,), (1,), (new,), encoder_slots=(0,)))


def test_embeddings_are_let_go_once_computed_or_freed(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    runner = make_runner(path)
    scheduler = MiniScheduler(runner, chunk=3)
    rows = soft_rows(load_oracle(path), SOURCE)
    add(scheduler, rows)
    aborted = add(scheduler, rows)
    held: list[int] = []
    while scheduler.running or scheduler.waiting:
        scheduler.step()
        held.append(len(runner._batch.embeds))
        if len(held) == 2:
            scheduler._release(aborted)
    assert held[0] == held[1] == 2 and held[2] == 1 and held[-1] == 0


def test_slot_embeds_find_the_tokens_that_have_rows() -> None:
    embeds = SlotEmbeds(2)
    embeds.put(3, np.arange(6, dtype=np.float32).reshape(3, 2), start=4)
    slots, positions = np.array([1, 3, 3, 3, 3]), np.array([4, 5, 6, 7, 8])
    found = embeds.find(slots, positions)
    assert found is not None
    assert found[0].tolist() == [1, 2] and found[1].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert embeds.find(np.array([1]), np.array([4])) is None
    embeds.drop([3])
    assert embeds.find(slots, positions) is None


def test_slot_embeds_of_several_places_from_a_position_on() -> None:
    embeds = SlotEmbeds(1)
    embeds.put_places(0, np.array([2, 3, 7], "<f4").tobytes(), ((0, 4), (7, 8)), start=2)
    positions = np.arange(9)
    found = embeds.find(np.zeros(9, np.int64), positions)
    assert found is not None
    assert dict(zip(positions[found[0]].tolist(), found[1].ravel().tolist(), strict=True)) == {2: 2, 3: 3, 7: 7}
