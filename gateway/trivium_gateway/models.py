"""GET /v1/models, GET /v1/models/{id}, GET /health/live, and GET /health/ready or GET /health."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from trivium.errors import EngineUnavailableError
from trivium_gateway.drain import Drain
from trivium_gateway.openai_protocol import Model, ModelList
from trivium_gateway.routing import ModelRoutes


class ModelEndpoints:
    """What is served. `created` is the start of this server."""

    def __init__(self, routes: ModelRoutes) -> None:
        self._routes = routes
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        names = (*self._routes.names(), *self._routes.adapters())
        return _json(ModelList(data=[self._model(name) for name in names]))

    async def get_model(self, request: Request) -> Response:
        return _json(self._model(request.path_params["name"]))

    def _model(self, name: str) -> Model:
        try:
            info = self._routes.find(name).model_info.limited_by(self._routes.adapter_of(name))
        except EngineUnavailableError:
            return Model(id=name, created=self._created)
        return Model(
            id=name,
            created=self._created,
            max_model_len=info.max_model_len,
            is_encoder_decoder=info.is_encoder_decoder,
            parent=self._routes.base_of(name) if self._routes.adapter_of(name) else UNSET,
        )


class HealthEndpoints:
    """`live`: the event loop answers. `ready`: a request sent now would start, on every model."""

    def __init__(self, routes: ModelRoutes, drain: Drain) -> None:
        self._routes = routes
        self._drain = drain

    async def live(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._drain.is_draining:
            return _json({"status": "draining"}, status=503)
        waiting_for = self._routes.waiting_for()
        if waiting_for:
            return _json({"status": "waiting", "waiting_for": waiting_for}, status=503)
        return _json({"status": "ok"})


def _json(value: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
