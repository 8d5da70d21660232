"""Grammars are compiled in a process of their own first: what is wrong or takes too long is refused, others go on."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import uvloop

from trivium.errors import EngineUnavailableError, InvalidRequestError, OverloadedError
from trivium.grammar import GrammarCompiler, GrammarVocabulary, bitmask_width, error_text
from trivium.structured_outputs import StructuredOutputsParams
from trivium.tokenizer import grammar_check
from trivium.tokenizer.grammar_check import GrammarChecker
from trivium.tokenizer.tokenizer import Tokenizer
from unit.tokenizer.tiny_tokenizers import make_backend, make_tokenizer, save_family

# The intersection of many patterns, which none of the compiler's own limits bounds.
ENDLESS = StructuredOutputsParams(
    json={"allOf": [{"type": "string", "pattern": f".*{'x' * count}.*"} for count in range(1, 40)]}
)
GOOD = StructuredOutputsParams(regex="[a-z]+")
_kept_alive: list[object] = []  # what C code may call until the process ends


def vocabulary() -> GrammarVocabulary:
    return make_tokenizer().grammar_vocabulary()


async def refusal(checker: GrammarChecker, params: StructuredOutputsParams) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await checker.check(params)
    assert caught.value.param == params.param
    return caught.value.message


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(vocabulary, max_compile_s=1.0)
        try:
            await checker.check(GOOD)
            start = time.monotonic()
            waiting = asyncio.create_task(checker.check(StructuredOutputsParams(regex="b")))
            assert "too complex" in await refusal(checker, ENDLESS)
            assert time.monotonic() - start < 10
            await waiting
            start = time.monotonic()
            assert "too complex" in await refusal(checker, ENDLESS)  # remembered
            assert time.monotonic() - start < 0.5
            await checker.check(StructuredOutputsParams(choice=["a"]))
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_a_machine_that_is_busy_says_nothing_about_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets no CPU time: the grammar is not refused, and can be compiled later."""

    async def scenario() -> None:
        checker = GrammarChecker(vocabulary, max_compile_s=0.5)
        try:
            await checker.check(GOOD)
            process = await checker._running_process()
            process._popen.send_signal(signal.SIGSTOP)
            other = StructuredOutputsParams(regex="[a-f]{3}")
            with pytest.raises(OverloadedError, match="busy"):
                await checker.check(other)
            await checker._running_process()
            monkeypatch.setattr(checker, "_max_compile_s", 10.0)
            await checker.check(other)
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_a_grammar_does_not_wait_for_ever_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.tokenizer.grammar_check.MAX_WAIT_S", 0.2)

    async def scenario() -> None:
        checker = GrammarChecker(vocabulary, max_compile_s=1.5)
        try:
            await checker.check(GOOD)
            endless = asyncio.create_task(checker.check(ENDLESS))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError):
                await checker.check(StructuredOutputsParams(regex="b"))
            await checker.check(GOOD)  # known, so it need not wait
            with pytest.raises(InvalidRequestError):
                await endless
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_a_process_that_is_being_started_ends_with_its_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Slow(grammar_check._Process):
        def __init__(self) -> None:
            time.sleep(0.3)
            super().__init__()
            started.append(psutil.Process(self._popen.pid))

    monkeypatch.setattr(grammar_check, "_Process", Slow)

    async def scenario() -> None:
        checker = GrammarChecker(vocabulary)
        waiting = asyncio.create_task(checker.check(GOOD))
        while checker._vocabulary is None:
            await asyncio.sleep(0.01)
        await checker.close()
        with pytest.raises((asyncio.CancelledError, EngineUnavailableError)):
            await waiting

    asyncio.run(scenario())
    (process,) = started
    assert not process.is_running()


def test_a_process_that_dies_is_replaced() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(vocabulary)
        try:
            await checker.check(GOOD)
            (await checker._running_process()).end()
            await checker.check(StructuredOutputsParams(regex="other"))
            assert "unclosed group" in await refusal(checker, StructuredOutputsParams(regex="a("))
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_a_caller_that_gives_up_leaves_no_answer_behind() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(vocabulary)
        try:
            await checker.check(GOOD)
            task = asyncio.create_task(checker.check(ENDLESS))
            await asyncio.sleep(0.2)
            killed = psutil.Process().children()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            deadline = time.monotonic() + 20
            while psutil.Process().children() in ([], killed):  # the next process starts by itself
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert "unclosed group" in await refusal(checker, StructuredOutputsParams(regex="a("))
            await checker.check(StructuredOutputsParams(regex="fine"))
        finally:
            await checker.close()

    asyncio.run(scenario())


def test_a_process_starts_without_fork_handlers() -> None:
    """gRPC's, in a process that serves, abort some of the children that uvloop forks before they have begun."""
    num_forks = 0

    @ctypes.CFUNCTYPE(None)
    def prepare() -> None:
        nonlocal num_forks
        num_forks += 1

    _kept_alive.append(prepare)
    ctypes.CDLL(None)["__register_atfork"](prepare, None, None, None)

    async def scenario() -> None:
        checker = GrammarChecker(vocabulary)
        try:
            await checker.check(GOOD)
        finally:
            await checker.close()

    uvloop.run(scenario())
    assert num_forks == 0

    async def fork_as_uvloop_does() -> None:
        await (await asyncio.create_subprocess_exec("true")).wait()

    uvloop.run(fork_as_uvloop_does())
    assert num_forks == 1, "the handler would have been called"


def test_a_tokenizer_whose_text_is_not_its_tokens_put_together_is_refused() -> None:
    async def scenario() -> None:
        checker = GrammarChecker(make_tokenizer("wordpiece").grammar_vocabulary)
        with pytest.raises(InvalidRequestError, match="tokenizer") as caught:
            await checker.check(GOOD)
        assert caught.value.code == "unsupported_parameter"

    asyncio.run(scenario())


def random_output(tokenizer: Tokenizer, params: StructuredOutputsParams, seed: int, eos: int) -> str:
    """The text of a random path through the grammar."""
    rng = np.random.default_rng(seed)
    tokens = tokenizer.grammar_vocabulary()
    matcher = GrammarCompiler(tokens, [eos]).compile(params)
    ids: list[int] = []
    while True:
        mask = np.zeros(bitmask_width(len(tokens.tokens)), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        assert matcher.consume_token(token)
        if token == eos:
            return tokenizer.decode(ids)
        ids.append(token)


WORDS = ["the quick fox", "naïve café", "one two"]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
def test_what_the_grammar_allows_is_what_the_tokenizer_writes(kind: str) -> None:
    tokenizer = make_tokenizer(kind)  # type: ignore[arg-type]
    eos = make_backend(kind).eos_token_id  # type: ignore[arg-type]
    outputs = {random_output(tokenizer, StructuredOutputsParams(choice=WORDS), seed, eos) for seed in range(30)}
    assert outputs == set(WORDS)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5", "byt5"])
def test_families_without_a_tokenizer_json(family: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / family, family)  # type: ignore[arg-type]
    tokenizer = Tokenizer.load(source)
    eos = tokenizer.encode(["a"])[0][-1]
    params = StructuredOutputsParams(choice=["the quick fox", "one two"])
    outputs = {random_output(tokenizer, params, seed, eos) for seed in range(20)}
    assert outputs == {"the quick fox", "one two"}


def test_characters_that_the_vocabulary_does_not_have_are_refused() -> None:
    compiler = GrammarCompiler(GrammarVocabulary((b"<s>", b"</s>", b"a"), (0, 1)), [1])
    with pytest.raises(InvalidRequestError, match="no token"):
        compiler.compile(StructuredOutputsParams(json_object=True))
    compiler.compile(StructuredOutputsParams(regex="a+"))


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ('{"a":1}', True),
        ('{ "a" : 1 }', True),
        ('{\n    "a": 1\n}', True),
        ('{  "a":1}', False),
        ('{\n\n"a":1}', False),
        ("{" + "\n" + 33 * " " + '"a":1}', False),
    ],
)
def test_json_has_a_bounded_amount_of_whitespace(text: str, is_taken: bool) -> None:
    tokenizer = make_tokenizer()
    matcher = GrammarCompiler(tokenizer.grammar_vocabulary(), [1]).compile(StructuredOutputsParams(json_object=True))
    (ids,) = tokenizer.encode([text], add_special_tokens=False)
    assert (matcher.validate_tokens(ids) == len(ids)) is is_taken


def test_what_the_compiler_says_is_one_line_without_its_insides() -> None:
    assert error_text("bad\n  thing <non-verbose/> ") == "bad thing"
    panic = "panic: repeating slices?\n<backtrace>\n 0: <unknown>\n 1: type_call at /tmp/build/typeobject.c:1091"
    assert error_text(panic) == "the compiler of grammars failed"
    assert len(error_text("x" * 10_000)) == 500


def test_the_cache_is_bounded_and_gives_fresh_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.grammar.MAX_CACHED_GRAMMARS", 2)
    compiler = GrammarCompiler(GrammarVocabulary((b"<s>", b"</s>", b"a", b"b"), (0, 1)), [1])
    first, second, third = (StructuredOutputsParams(regex=regex) for regex in ("ab", "ba", "aa"))
    for params in (first, second, first, third):
        matcher = compiler.compile(params)
        assert matcher.consume_token(3 if params is second else 2)
    assert compiler.find(second) is None
    again = compiler.find(first)
    assert again is not None and again.consume_token(2)
