"""The HTTP application: OpenAI's routes, adapters, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from lowrank.serve.api.completions import CompletionRequest
from lowrank.serve.api.embeddings import embed
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.middleware import AccessMiddleware
from lowrank.serve.api.ollama_api import add_ollama
from lowrank.serve.api.requests import ChatRequest, PublishRequest, refused
from lowrank.serve.api.responses import ResponsesRequest
from lowrank.serve.api.service import WARNING, Service
from lowrank.serve.engine import ImageEngine, ServedModel, ServeEngine
from lowrank.serve.limits import RequestLimits
from lowrank.serve.metrics import CountRequests
from lowrank.terminal import visible

_log = logging.getLogger(__name__)


def new_token() -> str:
    """One nobody can guess."""
    return secrets.token_urlsafe(24)


def make_app(
    engine: ServeEngine,
    *,
    token: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    limits: RequestLimits | None = None,
) -> FastAPI:
    """The whole server as an ASGI application. `hosts`: names it may be called by, besides localhost and numbers;
    `origins`: whose pages may ask from their visitors' browsers (CORS)."""
    limits = limits or RequestLimits()
    if isinstance(engine, ImageEngine) and engine.image_problem is None:
        limits = limits.for_pictures()
    service = Service(engine, limits)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncGenerator[None, None]:
        engine.start()
        try:
            yield
        finally:
            service.pools.close()
            await asyncio.to_thread(engine.close)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="lowrank", docs_url=None, redoc_url=None, lifespan=running)
    app.state.service = service
    app.add_middleware(AccessMiddleware, token=token, hosts=hosts, limits=limits)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[WARNING, "Retry-After"],
        )
    app.add_middleware(CountRequests, metrics=service.metrics)
    _add_errors(app)
    _add_routes(app, service)
    add_ollama(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        return await service.serve(ChatRequest, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        return await service.serve(CompletionRequest, request)

    @app.post("/v1/responses", response_model=None)
    async def respond(request: Request) -> Response:
        return await service.serve(ResponsesRequest, request)

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(request: Request) -> Response:
        return await embed(service, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served) for served in engine.served_models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        for served in engine.served_models():
            if served.name == name:
                return _model(served)
        raise ApiError(404, f"there is no model {name!r} here", code="model_not_found", param="model")

    @app.post("/v1/adapters")
    async def publish(request: Request) -> dict[str, Any]:
        body = await service.read(PublishRequest, request)
        return _model(await asyncio.to_thread(engine.publish, body.name, body.path))

    @app.delete("/v1/adapters/{name:path}")
    async def unpublish(name: str) -> dict[str, Any]:
        await asyncio.to_thread(engine.unpublish, name)
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if engine.alive else {"status": "down"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(engine), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """Every error in the form of its API. What went wrong inside is for the log, not for the client."""

    def respond(request: Request, refusal: ApiError) -> JSONResponse:
        return JSONResponse(refusal.body(request.url.path), refusal.status, headers=refusal.headers)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, refusal: ApiError) -> JSONResponse:
        return respond(request, refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, refused(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        described = _unknown_route(app, request) if error.status_code in (404, 405) else str(error.detail)
        return respond(request, ApiError(error.status_code, described, headers=error.headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return respond(request, ApiError(500, "the server failed; its log says why"))


def _unknown_route(app: FastAPI, request: Request) -> str:
    """Clients know more of OpenAI's and Ollama's routes than a model that writes text can answer."""
    served = sorted(f"{method} {route.path}" for route in app.routes if isinstance(route, APIRoute)
                    for method in route.methods or ())  # fmt: skip
    requested = f"{request.method} {visible(request.url.path)[:100]}"
    return f"{requested} is not served here; served are {', '.join(served)}"


def _model(served: ServedModel) -> dict[str, Any]:
    described = {"id": served.name, "object": "model", "created": served.created, "owned_by": "lowrank"}
    if served.parent is None:
        return described
    return {**described, "parent": served.parent, "version": served.version, "resident": served.resident}
