"""The progress bar of `LLM`: prompts done, and how many tokens went in and came out per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from trivium.outputs import RequestOutput


class Progress:
    """A bar over `total` prompts. use_tqdm: whether to show it, or what makes it (called as tqdm is)."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any], *, desc: str = "Processed prompts") -> None:
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = (
            make(total=total, desc=desc, unit="prompt", dynamic_ncols=True, postfix=_speed(0.0, 0.0))
            if use_tqdm
            else None
        )
        self._began_s = time.monotonic()
        self.num_input_tokens = 0
        self.num_output_tokens = 0

    def add(self, output: RequestOutput) -> None:
        """One prompt is done."""
        self.add_tokens(
            len(output.prompt_token_ids) + len(output.encoder_prompt_token_ids or ()),
            sum(len(choice.token_ids) for choice in output.outputs),
        )

    def add_tokens(self, num_input_tokens: int, num_output_tokens: int = 0) -> None:
        self.num_input_tokens += num_input_tokens
        self.num_output_tokens += num_output_tokens
        if self._bar is not None:
            seconds = max(time.monotonic() - self._began_s, 1e-6)
            self._bar.postfix = _speed(self.num_input_tokens / seconds, self.num_output_tokens / seconds)
            self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _speed(input_per_s: float, output_per_s: float) -> str:
    return f"est. speed input: {input_per_s:.2f} toks/s, output: {output_per_s:.2f} toks/s"
