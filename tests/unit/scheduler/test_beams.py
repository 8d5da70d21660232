"""Beam groups in the scheduler: what their beams read is in their blocks, and what they hold is what they need."""

from __future__ import annotations

import random
from collections import deque

import pytest

from toy import EOS, ToyExecutor, expected_beams, expected_output, make_info, make_request
from trivium.errors import InvalidRequestError
from trivium.outputs import FinishReason
from trivium.params import BeamSettings
from trivium.scheduler.request import Request
from trivium.scheduler.result_reader import RequestUpdate
from trivium.scheduler.scheduler import Scheduler
from trivium.step import ModelRunnerOutput


class World:
    """A scheduler and a toy executor with up to `depth` plans between them."""

    def __init__(self, *, depth: int = 2, **info: object) -> None:
        self.info = make_info(**info)
        self.scheduler = Scheduler(self.info)
        self.executor = ToyExecutor(self.info)
        self.depth = depth
        self.results: deque[ModelRunnerOutput] = deque()
        self.updates: list[RequestUpdate] = []
        self.keys = 1000
        self.max_held = 0

    def add_beams(
        self, key: int, prompt: tuple[int, ...] = (5, 6, 7), *, width: int = 4, n: int = 1, **params: object
    ) -> list[Request]:
        beam = BeamSettings(width=width, length_penalty=params.pop("length_penalty", 1.0))  # type: ignore[arg-type]
        choices = [make_request(key, prompt, temperature=0.0, n=n, beam=beam, **params) for _ in range(n)]  # type: ignore[arg-type]
        for index, choice in enumerate(choices):
            choice.key, choice.choice_index = key * 10 + index, index
        self.keys += 1
        self.scheduler.add_beams(choices, self.keys)
        return choices

    def step(self) -> bool:
        """Plan and execute, or take a result; False if there was nothing to do."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.results.append(self.executor.execute(plan))
        had_results = bool(self.results)
        if had_results and (plan is None or len(self.results) >= self.depth):
            self.updates += self.scheduler.update_from_output(self.results.popleft())
        self.max_held = max(self.max_held, self.scheduler.num_held_blocks)
        self.scheduler.check_invariants()
        return had_results

    def run(self) -> None:
        for _ in range(5000):
            if not self.step():
                return
        raise AssertionError("it never ends")

    def lose_executor(self) -> None:
        self.scheduler.requeue_all()
        self.executor = ToyExecutor(self.info, last_step=self.executor.last_step)
        self.results.clear()


def check(choices: list[Request]) -> None:
    expected = expected_beams(choices[0])
    for choice in choices:
        assert choice.is_finished and choice.output_token_ids == expected[choice.choice_index]
        ended = choice.output_token_ids[-1] == EOS
        assert choice.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)


@pytest.mark.parametrize("width", range(1, 7))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_beams_read_what_they_wrote(width: int, depth: int) -> None:
    world = World(depth=depth, max_num_seqs=width)
    for key in range(1, 9):
        choices = world.add_beams(key, tuple(range(2, 2 + key)), width=width, n=min(2, width), max_tokens=14)
        world.run()
        check(choices)
        assert world.scheduler.num_held_blocks == 0


def test_a_prompt_in_pieces_and_encoder_inputs() -> None:
    world = World(max_num_batched_tokens=5, is_encoder_decoder=True, max_encoder_len=12, num_blocks=64)
    groups = [world.add_beams(key, tuple(range(2, 15)), encoder=(key, 3, 4, 5, 6), n=2) for key in range(2, 6)]
    world.run()
    for choices in groups:
        check(choices)
    assert world.executor.num_encoder_runs == 4 and world.scheduler.num_held_blocks == 0


def test_one_source_is_encoded_once_for_all_beams_and_requests() -> None:
    world = World(is_encoder_decoder=True, max_encoder_len=12)
    for key in range(1, 4):
        world.add_beams(key, (2,), encoder=(9, 8, 7))
    world.run()
    assert world.executor.num_encoder_runs == 1


def test_beams_hold_no_more_than_greedy_and_what_they_differ_in() -> None:
    """At most greedy's blocks, one partial block per beam, and the tokens on which beams differ."""
    world = World(max_num_seqs=4, num_blocks=64, max_model_len=200)
    (choice,) = world.add_beams(3, tuple(range(2, 32)), max_tokens=40)
    size = world.info.block_size
    while not choice.is_finished:
        world.step()
        group = choice.beams
        assert group is not None
        leader = group.leader
        if leader.slot < 0:
            continue
        computed = world.scheduler.num_computed_tokens(leader)
        tables = [row.tokens for slot, row in world.executor.rows.items() if slot in group.slots]
        common = min(_common(tables[0], table) for table in tables)
        differing = sum(max(0, computed - common) for _ in tables)
        allowed = -(-computed // size) + len(tables) + -(-differing // size)
        # One step may pass before the scheduler knows that a beam has gone.
        assert world.scheduler.num_held_blocks <= allowed + world.depth * len(tables)
    world.run()
    assert world.scheduler.num_held_blocks == 0


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with together."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


def test_text_that_all_beams_agree_on_is_given_early_and_never_taken_back() -> None:
    world = World(max_num_seqs=4, num_blocks=64)
    early = 0
    for key in range(1, 30):
        choices = world.add_beams(key, (2, key), n=2, max_tokens=20)
        while not all(choice.is_finished for choice in choices):
            world.step()
            for choice in choices:
                output = choice.output_token_ids
                assert output == expected_beams(choice)[choice.choice_index][: len(output)]
                early += bool(choice.output_token_ids) and not choice.is_finished
    given = {choice.key: list[int]() for choice in choices}
    for update in world.updates:
        if update.request.key in given:
            given[update.request.key] += update.new_token_ids
    assert all(given[choice.key] == choice.output_token_ids for choice in choices)
    assert early > 0, "nothing was given before the end"


def test_a_group_without_room_is_refused_with_both_numbers() -> None:
    world = World(max_num_seqs=3)
    with pytest.raises(InvalidRequestError, match="4 beams are wanted, but the server computes at most 3"):
        world.add_beams(1, width=4)
    world = World(num_blocks=8)
    with pytest.raises(InvalidRequestError, match=r"may need 16 KV blocks .* has 8"):
        world.add_beams(1, (2, 3, 4), width=4, max_tokens=11)


def test_abort_of_all_choices_frees_the_group_and_one_alone_does_not() -> None:
    world = World()
    choices = world.add_beams(1, n=2, max_tokens=30)
    for _ in range(4):
        world.step()
    world.scheduler.finish(choices[0], FinishReason.ABORT)
    world.scheduler.check_invariants()
    assert world.scheduler.num_held_blocks > 0
    world.scheduler.finish(choices[1], FinishReason.ABORT)
    world.scheduler.check_invariants()
    assert world.scheduler.num_held_blocks == 0 and world.scheduler.num_running == 0
    world.run()


@pytest.mark.parametrize("seed", range(40))
def test_random_timelines_of_groups_and_rows(seed: int) -> None:
    """Arrivals, cancels, preemptions and lost executors, beside greedy requests: every result as if it ran alone."""
    rng = random.Random(seed)
    world = World(
        depth=rng.randint(1, 3),
        num_blocks=rng.randint(24, 36),
        max_num_seqs=rng.randint(4, 9),
        max_num_batched_tokens=rng.randint(6, 20),
        block_size=rng.choice((2, 3, 4)),
        is_encoder_decoder=bool(seed % 2),
        max_encoder_len=12,
    )
    groups, rows = [], []
    for key in range(1, 30):
        encoder = tuple(rng.randrange(2, 50) for _ in range(rng.choice((2, 5)))) if seed % 2 else None
        prompt = tuple(rng.choice((3, 4)) for _ in range(rng.randint(1, 9)))
        if rng.random() < 0.6:
            width = rng.randint(1, 4)
            groups.append(
                world.add_beams(
                    key, prompt, width=width, n=rng.randint(1, width), encoder=encoder, max_tokens=rng.randint(1, 9)
                )
            )
        else:
            rows.append(make_request(key * 10, prompt, encoder=encoder, max_tokens=rng.randint(1, 12)))
            world.scheduler.add_request(rows[-1])
        for _ in range(rng.randint(0, 4)):
            world.step()
        if groups and rng.random() < 0.15:
            for choice in rng.choice(groups):
                world.scheduler.finish(choice, FinishReason.ABORT)
        if rng.random() < 0.05:
            world.lose_executor()
    world.run()
    for choices in groups:
        if all(choice.finish_reason is not FinishReason.ABORT for choice in choices):
            check(choices)
    for request in rows:
        assert request.output_token_ids == expected_output(request)
    assert world.scheduler.num_held_blocks == 0
    assert any(choice.is_finished for choices in groups for choice in choices)
