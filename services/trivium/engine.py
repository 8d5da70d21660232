"""`EngineClient`: the one seam between whoever has a prompt (gateway, `LLM`) and whoever generates.

Two implementations: `RemoteEngine` (remote_engine.py) talks to scheduler and tokenizer processes over gRPC,
`LocalEngine` (local_engine.py) runs the same cores in this process without a socket.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, Protocol

from trivium.config import ModelInfo
from trivium.inputs import EncodedPair, GenerationRequest, PairTexts
from trivium.outputs import ChoiceDelta, TokenText
from trivium.pooling import PoolingParams
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1.ledger_pb2 import LedgerReply


class EngineClient(Protocol):
    """One served model."""

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model. Raises EngineUnavailableError before the first contact with the engine."""
        ...

    def is_ready(self) -> bool:
        """True if a request sent now would start without waiting for a process to come back."""
        ...

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        ...

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """Both sides of an encoder-decoder prompt, each by its own tokenizer. Raises InvalidRequestError."""
        ...

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Raise InvalidRequestError naming the part of `params` that the model cannot be held to."""
        ...

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat, by the model's chat template, which may have variables of its own (`template_kwargs`).

        -1 - k stands for the k-th content part of type "prompt_embeds" (`chat_embeds.py`).
        Raises InvalidRequestError if the model has no template or the template refuses the messages.
        """
        ...

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`; ids without a token have none."""
        ...

    async def token_texts(self, token_ids: Collection[int]) -> Mapping[int, TokenText]:
        """What the tokens of the model stand for: at least `token_ids`, which are in its vocabulary."""
        ...

    async def embed(self, prompts: Sequence[Sequence[int]], params: PoolingParams) -> list[Sequence[float]]:
        """The vector of each of `prompts`, which fit one pass of the model (`pooling.check_embed`).

        Raises TriviumError.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices of `request` until each has a finish reason.

        Raises TriviumError. Closing the generator early (`aclose`) aborts the request and frees its blocks.
        """
        ...

    async def ledger(self) -> dict[str, LedgerReply | None]:
        """Service -> what it holds right now, or None if it did not answer within LEDGER_TIMEOUT_S.

        Never raises. A service that serves several models answers to the engine of each.
        """
        ...

    async def close(self) -> None:
        """Abort what runs and let go of processes or connections."""
        ...
