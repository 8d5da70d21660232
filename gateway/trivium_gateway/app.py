"""The gateway: routes, and the process that serves them.

Knows engines only as `EngineClient`s; `serve` is the one place that decides they are remote.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from trivium.config import GatewayConfig
from trivium.remote_engine import RemoteEngine
from trivium_gateway.auth import ApiKeyCheck
from trivium_gateway.chat import ChatEndpoint
from trivium_gateway.completions import CompletionsEndpoint
from trivium_gateway.drain import Drain
from trivium_gateway.embeddings import EmbeddingsEndpoint
from trivium_gateway.errors import MethodNotAllowedError, NotFoundError
from trivium_gateway.exposition import MetricsEndpoint
from trivium_gateway.front_door import FrontDoor
from trivium_gateway.metrics import GatewayMetrics
from trivium_gateway.models import HealthEndpoints, ModelEndpoints
from trivium_gateway.rate_limit import RateLimit
from trivium_gateway.request_reader import RequestReader
from trivium_gateway.routing import ModelRoutes
from trivium_gateway.server import bind, run_server
from trivium_gateway.text_tasks import SummarizationsEndpoint, TranslationsEndpoint
from trivium_gateway.tokenize import DetokenizeEndpoint, TokenizeEndpoint, version


def create_app(
    routes: ModelRoutes,
    lifespan: Lifespan[Starlette] | None = None,
    *,
    config: GatewayConfig | None = None,
    drain: Drain | None = None,
) -> Starlette:
    """The ASGI application for the models in `routes`. `drain` lets its server end it in order."""
    config = config or GatewayConfig()
    drain = drain or Drain()
    models = ModelEndpoints(routes)
    health = HealthEndpoints(routes, drain)
    metrics = GatewayMetrics(routes.names())
    reader = RequestReader(metrics, is_strict=config.strict)
    generating, embeds = (routes, reader, drain, metrics), config.enable_prompt_embeds
    chat = ChatEndpoint(*generating, enable_prompt_embeds=embeds, tool_parsers=config.tool_parsers)
    app = Starlette(
        routes=[
            Route("/health", health.ready),  # as vLLM's scripts ask
            Route("/health/live", health.live),
            Route("/health/ready", health.ready),
            Route("/v1/models", models.list_models),
            Route("/v1/models/{name:path}", models.get_model),
            Route("/v1/completions", CompletionsEndpoint(*generating, enable_prompt_embeds=embeds), methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/translations", TranslationsEndpoint(*generating), methods=["POST"]),
            Route("/v1/summarizations", SummarizationsEndpoint(*generating), methods=["POST"]),
            Route("/v1/embeddings", EmbeddingsEndpoint(routes, reader, drain), methods=["POST"]),
            Route("/tokenize", TokenizeEndpoint(routes, reader), methods=["POST"]),
            Route("/detokenize", DetokenizeEndpoint(routes, reader), methods=["POST"]),
            Route("/version", version),
            Route("/metrics", MetricsEndpoint(routes, metrics).get),
        ],
        middleware=[
            Middleware(
                FrontDoor,
                api_key=ApiKeyCheck(config.api_key),
                rate_limit=_rate_limit(config),
                drain=drain,
                metrics=metrics,
            )
        ],
        exception_handlers={HTTPException: _raise_as_ours},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _rate_limit(config: GatewayConfig) -> RateLimit | None:
    if not config.max_requests_per_minute:
        return None
    return RateLimit(config.max_requests_per_minute, by_key=config.api_key is not None)


async def _raise_as_ours(request: Request, error: Exception) -> Response:
    """The router's 404 and 405 as errors of ours, for the front door to answer."""
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    if error.status_code == 405:
        raise MethodNotAllowedError(allow=", ".join(sorted((error.headers or {}).get("Allow", "").split(", "))))
    raise NotFoundError("no such path")


async def serve(
    *,
    models: Mapping[str, str],
    tokenizer: str,
    host: str,
    port: int,
    config: GatewayConfig,
    stop: asyncio.Event,
) -> None:
    """Serve `models` (served name -> scheduler address) on `host`:`port` until `stop` is set, then drain.

    Does not wait for the engines: `/health/ready` tells when they are there. Raises ConfigurationError for an address
    that cannot be listened on.
    """
    with bind(host, port) as listener:
        async with _engines(models, tokenizer) as engines:
            drain = Drain()
            app = create_app(ModelRoutes(engines), config=config, drain=drain)
            await run_server(app, listener, drain=drain, stop=stop, drain_timeout_s=config.drain_timeout_s)


@asynccontextmanager
async def _engines(models: Mapping[str, str], tokenizer: str) -> AsyncIterator[dict[str, RemoteEngine]]:
    """Engines by served name, started, and closed at the end."""
    async with AsyncExitStack() as stack:
        engines: dict[str, RemoteEngine] = {}
        for name, address in models.items():
            engine = RemoteEngine(name=name, scheduler_address=address, tokenizer_address=tokenizer)
            stack.push_async_callback(engine.close)
            await engine.start()
            engines[name] = engine
        yield engines
