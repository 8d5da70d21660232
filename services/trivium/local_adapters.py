"""The adapters that requests of an offline program have brought: each is loaded once, by its first request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from trivium.adapters import LoRARequest, PromptAdapterRequest
from trivium.config import ModelInfo, PromptAdapter
from trivium.errors import ConfigurationError, InvalidRequestError


class AdapterExecutor(Protocol):
    """Loads adapters in the model's thread. Both raise ConfigurationError."""

    async def load_adapter(self, name: str, source: str) -> None: ...

    async def load_prompt_adapter(self, name: str, source: str) -> PromptAdapter: ...


class AdapterLoop(Protocol):
    """What has to know of them."""

    @property
    def model_info(self) -> ModelInfo: ...

    def add_adapter(self, name: str) -> None: ...

    def add_prompt_adapter(self, adapter: PromptAdapter) -> None: ...


class LocalAdapters:
    """Owner: the LocalEngine. find_loop: the running engine."""

    def __init__(self, executor: AdapterExecutor, find_loop: Callable[[], AdapterLoop]) -> None:
        self._executor = executor
        self._find_loop = find_loop
        self._loras: set[LoRARequest] = set()  # those that are loaded
        self._prompts: set[PromptAdapterRequest] = set()
        self._loading = asyncio.Lock()  # one adapter at a time

    async def load(self, request: LoRARequest) -> None:
        """Make sure that the adapter can be used. Raises InvalidRequestError for one that cannot, or changes."""
        loop = self._find_loop()
        if not loop.model_info.max_loras:
            raise InvalidRequestError("lora_request needs enable_lora=True", param="lora_request")
        async with self._loading:
            if request in self._loras:
                return
            for other in self._loras:
                if request.lora_name == other.lora_name or request.lora_int_id == other.lora_int_id:
                    raise InvalidRequestError(f"{request} has the name or number of {other}", param="lora_request")
            self._check_name(request.lora_name, "lora_request")
            try:
                await self._executor.load_adapter(request.lora_name, request.lora_path)
            except ConfigurationError as error:
                raise InvalidRequestError(error.message, param="lora_request") from None
            self._loras.add(request)
            loop.add_adapter(request.lora_name)

    async def load_prompt(self, request: PromptAdapterRequest) -> None:
        """The same for a soft prompt, which must have as many virtual tokens as the request says."""
        loop, param = self._find_loop(), "prompt_adapter_request"
        if not loop.model_info.max_prompt_adapters:
            raise InvalidRequestError("prompt_adapter_request needs enable_prompt_adapter=True", param=param)
        async with self._loading:
            if request in self._prompts:
                return
            name, number = request.prompt_adapter_name, request.prompt_adapter_id
            for other in self._prompts:
                if name == other.prompt_adapter_name or number == other.prompt_adapter_id:
                    raise InvalidRequestError(f"{request} has the name or number of {other}", param=param)
            self._check_name(name, param)
            try:
                loaded = await self._executor.load_prompt_adapter(name, request.prompt_adapter_local_path)
            except ConfigurationError as error:
                raise InvalidRequestError(error.message, param=param) from None
            self._prompts.add(replace(request, prompt_adapter_num_virtual_tokens=loaded.num_virtual_tokens))
            loop.add_prompt_adapter(loaded)
        if request not in self._prompts:
            raise InvalidRequestError(
                f"prompt_adapter_num_virtual_tokens is {request.prompt_adapter_num_virtual_tokens}, but {name!r} has "
                f"{loaded.num_virtual_tokens}",
                param=param,
            )

    def _check_name(self, name: str, param: str) -> None:
        info = self._find_loop().model_info
        if name in (info.name, *info.adapter_names):
            raise InvalidRequestError(f"the name {name!r} is taken", param=param)
