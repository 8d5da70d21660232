"""The first rank of a split model: a ModelRunner that has the others do whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from trivium.config import ExecutorConfig, PromptAdapter
from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor.deferred_steps import StartedStep
from trivium.executor.loader import find_checkpoint
from trivium.executor.model_runner import ModelRunner
from trivium.executor.parallel.calls import (
    adapter_to_bytes,
    config_to_bytes,
    embed_to_bytes,
    grammar_to_bytes,
    plan_to_bytes,
)
from trivium.executor.parallel.communicator import LOAD_TIMEOUT_S, STEP_TIMEOUT_S
from trivium.executor.parallel.frames import Call
from trivium.executor.parallel.ranks import Ranks
from trivium.executor.plan_check import PlanError
from trivium.executor.platform import choose_device
from trivium.pooling import PoolingType
from trivium.step import SchedulerOutput
from trivium.structured_outputs import StructuredOutputsParams


class LeadingRunner(ModelRunner):
    """The only rank that has a scheduler and whose results count; it never sends the others anything but calls.

    An exception that only one rank may have met ends all ranks: they could not meet again.
    """

    def __init__(self, config: ExecutorConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        # A hub model is downloaded once, before anybody looks for its files.
        config = replace(config, model=str(find_checkpoint(config)))
        with self._in_lockstep(Call.LOAD, config_to_bytes(config)):
            ranks.communicator.set_timeout(LOAD_TIMEOUT_S)
            super().__init__(config, ranks.communicator)
            ranks.communicator.set_timeout(STEP_TIMEOUT_S)
        ranks.remove_rendezvous()

    @property
    def kv_pool_bytes(self) -> int:
        """Of all ranks."""
        return super().kv_pool_bytes * self._ranks.communicator.size

    def reset(self) -> None:
        with self._in_lockstep(Call.RESET):
            super().reset()

    def close(self) -> None:
        super().close()
        self._ranks.close()

    def prepare_grammar(
        self, params: StructuredOutputsParams | None, done: Callable[[InvalidRequestError | None], None]
    ) -> None:
        with self._in_lockstep(Call.GRAMMAR, grammar_to_bytes(params)):
            super().prepare_grammar(params, done)

    def start(self, plan: SchedulerOutput) -> StartedStep:
        with self._in_lockstep(Call.PLAN, plan_to_bytes(plan)):
            return super().start(plan)  # a rank of several waits for its result

    def embed(self, prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool) -> list[Tensor]:
        with self._in_lockstep(Call.EMBED, embed_to_bytes(prompts, kind, normalize=normalize)):
            return super().embed(prompts, kind, normalize=normalize)

    def load_adapter(self, name: str, source: str) -> None:
        with self._in_lockstep(Call.ADAPTER, adapter_to_bytes(name, source)):
            super().load_adapter(name, source)

    def load_prompt_adapter(self, name: str, source: str) -> PromptAdapter:
        with self._in_lockstep(Call.PROMPT_ADAPTER, adapter_to_bytes(name, source)):
            return super().load_prompt_adapter(name, source)

    @contextmanager
    def _in_lockstep(self, call: Call, arguments: bytes = b"") -> Iterator[None]:
        try:
            self._ranks.call(call, arguments)
            yield
        except (PlanError, ConfigurationError):
            raise  # every rank refuses the same, having changed nothing
        except Exception as error:
            raise self._ranks.fail(error) from error


def open_runner(config: ExecutorConfig, on_lost: Callable[[Exception], None]) -> ModelRunner:
    """The runner of a model, split or not, in the thread that will run it.

    on_lost: is told from another thread why a split model cannot go on. Raises ConfigurationError.
    """
    if config.tensor_parallel_size == 1:
        return ModelRunner(config)
    ranks = Ranks(
        config.tensor_parallel_size,
        name=f"executor {config.served_model_name}",
        device=choose_device(config.device),
        on_lost=on_lost,
    )
    try:
        return LeadingRunner(config, ranks)
    except BaseException:
        ranks.close()
        raise
