"""Clients in the middle of a stream, for whoever wants to disturb them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import openai

from cluster import Cluster

NUM_STREAMS = 4
MAX_TOKENS = 1200  # a second or two of decoding, so that a kill finds every stream in the middle


class Stream(threading.Thread):
    """One streamed completion of the model "llama". `first` is set with its first text.

    num_cached_tokens: as its usage says at the end.
    """

    def __init__(self, cluster: Cluster, prompt: str, *, temperature: float, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0)
        self.prompt = prompt
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.first = threading.Event()
        self.text = ""
        self.finish_reason: str | None = None
        self.num_cached_tokens: int | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            chunks = self.client.completions.create(
                model="llama",
                prompt=self.prompt,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=7,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in chunks:
                if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                    self.num_cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens
                    break
                self.text += chunk.choices[0].text
                self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
                self.first.set()
        except Exception as error:
            self.error = error
        finally:
            self.first.set()
            self.client.close()


def run_streams(
    cluster: Cluster, disturb: Callable[[], object] = lambda: None, *, max_tokens: int = MAX_TOKENS
) -> list[str]:
    """Texts of concurrent streams, greedy and sampled, with one disturbance once all of them have begun."""
    streams = [
        Stream(cluster, "x" * index, temperature=float(index % 2), max_tokens=max_tokens)
        for index in range(1, NUM_STREAMS + 1)
    ]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.first.wait(60)
    disturb()
    for stream in streams:
        stream.join(90)
        assert stream.error is None and not stream.is_alive(), f"{stream.error}\n{cluster.log.read_text()[-3000:]}"
        assert stream.finish_reason == "length"
    return [stream.text for stream in streams]
