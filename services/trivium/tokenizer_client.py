"""The tokenizer service as its callers see it: text in, token ids out.

Owns retries and time limits of the unary calls. The Detokenize stream is the scheduler's own business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from trivium import wire
from trivium.errors import EngineUnavailableError, InvalidRequestError
from trivium.inputs import EncodedPair, PairTexts
from trivium.outputs import TokenText
from trivium.rpc import error_from_rpc
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import tokenizer_pb2, tokenizer_pb2_grpc

CALL_TIMEOUT_S = 20.0  # for all tries together: a tokenizer that crashed is back in a few seconds
MAX_TOKENS = 16384  # ids in one call
FIRST_RETRY_S = 0.05
MAX_RETRY_S = 0.5


class TokenizerClient:
    """The tokenizer of `model` behind `channel`. The channel belongs to the caller, who closes it.

    Remembers the tokens that it was asked for: they are at most the model's vocabulary, and never change.
    """

    def __init__(self, model: str, channel: grpc.aio.Channel) -> None:
        self._model = model
        self._stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        self._tokens: dict[int, TokenText] = {}  # token id -> what it stands for

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. Raises TriviumError."""
        try:
            request = tokenizer_pb2.EncodeRequest(model=self._model, texts=texts, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, ValueError):
            raise InvalidRequestError(
                "the text holds a lone surrogate, which is not a character", param="prompt", code="invalid_unicode"
            ) from None
        response: tokenizer_pb2.EncodeResponse = await self._call(self._stub.Encode, request)
        return [list(output.ids) for output in response.outputs]

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """Both sides of an encoder-decoder prompt. Raises TriviumError."""
        try:
            request = wire.pair_texts_to_proto(texts, self._model)
        except (UnicodeEncodeError, ValueError):
            raise InvalidRequestError(
                "the text holds a lone surrogate, which is not a character", param="prompt", code="invalid_unicode"
            ) from None
        return wire.encoded_pair_from_proto(await self._call(self._stub.EncodePair, request))

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Raise InvalidRequestError naming the part of `params` that the model cannot be held to; TriviumError."""
        request = tokenizer_pb2.CheckGrammarRequest(
            model=self._model, structured_outputs=wire.structured_outputs_to_proto(params)
        )
        await self._call(self._stub.CheckGrammar, request)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat, by the model's chat template; -1 - k for the k-th part of type "prompt_embeds".

        Raises InvalidRequestError if the model has no template or the template refuses the messages.
        """
        request = tokenizer_pb2.RenderRequest(
            model=self._model,
            messages_json=_to_json(messages, "messages"),
            tools_json=_to_json(tools, "tools") if tools else b"",
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs_json=_to_json(template_kwargs, "chat_template_kwargs") if template_kwargs else b"",
        )
        return wire.rendered_from_proto(await self._call(self._stub.Render, request))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`. Raises TriviumError."""
        request = tokenizer_pb2.DecodeRequest(model=self._model, ids=token_ids, skip_special_tokens=skip_special_tokens)
        response: tokenizer_pb2.DecodeResponse = await self._call(self._stub.Decode, request)
        return response.text

    async def token_texts(self, token_ids: Collection[int]) -> Mapping[int, TokenText]:
        """What the tokens of this model stand for: at least `token_ids`. Raises TriviumError."""
        missing = list({token_id for token_id in token_ids if token_id not in self._tokens})
        for start in range(0, len(missing), MAX_TOKENS):
            ids = missing[start : start + MAX_TOKENS]
            request = tokenizer_pb2.GetTokensRequest(model=self._model, ids=ids)
            response: tokenizer_pb2.GetTokensResponse = await self._call(self._stub.GetTokens, request)
            for token_id, token in zip(ids, response.tokens, strict=True):
                self._tokens[token_id] = TokenText(token.text, token.raw, token.is_special)
        return self._tokens

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable[Any, Any], request: Any) -> Any:
        """Call until an answer comes, the error is none of availability, or CALL_TIMEOUT_S are over."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + CALL_TIMEOUT_S
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return await method(request, timeout=max(0.001, deadline - clock()), wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise EngineUnavailableError("the tokenizer did not answer in time") from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE or clock() + delay_s > deadline:
                    raise error_from_rpc(error) from None
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RETRY_S)


def _to_json(value: Sequence[Mapping[str, Any]] | Mapping[str, Any], name: str) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequestError(f"{name} cannot be written as JSON", param=name, code=f"invalid_{name}") from None
