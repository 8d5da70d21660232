"""Which engine serves a model name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from trivium.engine import EngineClient
from trivium.errors import EngineUnavailableError, ModelNotFoundError


class ModelRoutes:
    """Served model name -> engine, in the order in which the models were named at start."""

    def __init__(self, engines: Mapping[str, EngineClient]) -> None:
        self._engines = dict(engines)  # served name -> engine

    def names(self) -> Sequence[str]:
        """The served names."""
        return tuple(self._engines)

    def adapters(self) -> dict[str, str]:
        """Adapter name -> served name of its base, as far as the models have been reached. A served name goes first."""
        found: dict[str, str] = {}
        for base, engine in self._engines.items():
            with suppress(EngineUnavailableError):
                found.update((name, base) for name in engine.model_info.adapter_names if name not in self._engines)
        return found

    def base_of(self, name: str) -> str:
        """The served name of the base of adapter `name`; any other name is its own."""
        return name if name in self._engines else self.adapters().get(name, name)

    def adapter_of(self, name: str) -> str:
        """`name` if it is an adapter's, else empty."""
        return "" if name in self._engines or name not in self.adapters() else name

    def find(self, name: str) -> EngineClient:
        """The engine of model or adapter `name`. Raises ModelNotFoundError."""
        engine = self._engines.get(self.base_of(name))
        if engine is None:
            raise ModelNotFoundError(f"the model {name[:100]!r} does not exist", param="model")
        return engine

    def waiting_for(self) -> list[str]:
        """Names of the models that could not start a request now."""
        return [name for name, engine in self._engines.items() if not engine.is_ready()]
