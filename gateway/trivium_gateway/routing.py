"""Which engine serves a model name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trivium.engine import EngineClient
from trivium.errors import ModelNotFoundError


class ModelRoutes:
    """Served model name -> engine, in the order in which the models were named at start."""

    def __init__(self, engines: Mapping[str, EngineClient]) -> None:
        self._engines = dict(engines)  # served name -> engine

    def names(self) -> Sequence[str]:
        """The served names."""
        return tuple(self._engines)

    def find(self, name: str) -> EngineClient:
        """The engine of model `name`. Raises ModelNotFoundError."""
        engine = self._engines.get(name)
        if engine is None:
            raise ModelNotFoundError(f"the model {name[:100]!r} does not exist", param="model")
        return engine

    def waiting_for(self) -> list[str]:
        """Names of the models that could not start a request now."""
        return [name for name, engine in self._engines.items() if not engine.is_ready()]
