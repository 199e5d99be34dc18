"""The HTTP face: OpenAI's routes, adapters, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lowrank.serve.engine import Engine, Voice
from lowrank.serve.exchange import Admission, ClientGone, Exchange
from lowrank.serve.guard import Guard
from lowrank.serve.limits import Limits
from lowrank.serve.metrics import CountRequests, Metrics
from lowrank.serve.refusal import Refusal
from lowrank.serve.replies import ChatReply, CompletionReply, embeddings, usage
from lowrank.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest, PublishRequest, refused
from lowrank.serve.tool_calls import ToolCallReader

Reply = ChatReply | CompletionReply
_CLIENT_GONE = 499
"""nginx' status for the log; nobody receives it."""
_log = logging.getLogger(__name__)


def new_token() -> str:
    """One nobody can guess."""
    return secrets.token_urlsafe(24)


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics()
        self.admission = Admission(limits)

    async def answer(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """A reply or a stream; whatever happens, what is not finished is cancelled and its place is free."""
        questions, configs = body.ask(self.limits)
        count = len(questions) * len(configs)
        if count > self.limits.answers_per_request:
            message = f"{count} answers in one request; this server gives {self.limits.answers_per_request}"
            raise Refusal(400, message, param="n")
        exchange = Exchange(self.limits, self.admission, count)
        try:
            for question in questions:
                exchange.answers += await asyncio.to_thread(self.engine.ask, body.model, question, configs)
            exchange.begin(request.receive)
            reply = self._reply(body, count)
            if body.stream:
                prompts = len(questions) if body.stream_options.include_usage else None
                return _EventStream(_events(exchange, reply, prompts), lambda: self._end(exchange))
            async for index, piece in exchange.pieces():
                reply.add(index, piece)
            response = JSONResponse(reply.whole(usage((each.answer for each in exchange.answers), len(questions))))
        except ClientGone:
            response = Response(status_code=_CLIENT_GONE)
        except BaseException:
            self._end(exchange)
            raise
        self._end(exchange)
        return response

    async def embed(self, body: EmbeddingRequest, request: Request) -> Response:
        """One text after another, so that a client that leaves is noticed, and answers in the making go on."""
        texts = body.texts()
        if len(texts) > self.limits.texts_per_request:
            message = f"{len(texts)} texts in one request; this server reads {self.limits.texts_per_request}"
            raise Refusal(400, message, param="input")
        self.admission.take(1)
        started = time.monotonic()
        vectors, tokens = [], 0
        try:
            for text in texts:
                if time.monotonic() - started > self.limits.request_seconds:
                    message = f"the texts took more than {self.limits.request_seconds:g} seconds"
                    raise Refusal(504, message, code="timeout")
                if await request.is_disconnected():
                    return Response(status_code=_CLIENT_GONE)
                vector_D, length = await asyncio.to_thread(self.engine.embed, body.model, text, body.pooling)
                vectors.append(vector_D)
                tokens += length
        finally:
            self.admission.give_back(1, time.monotonic() - started)
        return JSONResponse(embeddings(body.model, vectors, tokens, body.encoding_format))

    def _reply(self, body: ChatRequest | CompletionRequest, count: int) -> Reply:
        if isinstance(body, CompletionRequest):
            return CompletionReply(body.model, count, self.engine.token_text, logprobs=body.logprobs is not None)
        reader = None
        if body.uses_tools:
            template = self.engine.chat_template(body.model)
            reader = lambda: ToolCallReader(template, body.tools)  # noqa: E731 (one for each answer)
        return ChatReply(body.model, count, self.engine.token_text, logprobs=body.logprobs, reader=reader)

    def _end(self, exchange: Exchange) -> None:
        cancelled = not exchange.complete
        seconds = exchange.close()
        if exchange.answers:
            answers = [each.answer for each in exchange.answers]
            asked, said = sum(each.prompt_tokens for each in answers), sum(len(each.tokens) for each in answers)
            self.metrics.count_answers(asked, said, seconds, exchange.first_token, cancelled)


async def _events(exchange: Exchange, reply: Reply, prompts: int | None) -> AsyncIterator[str]:
    """Server-sent events; `prompts` where the usage is wanted."""
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        async for index, piece in exchange.pieces():
            for chunk in reply.add(index, piece):
                yield _event(chunk)
        if prompts is not None:
            yield _event(reply.last(usage((each.answer for each in exchange.answers), prompts)))
        yield "data: [DONE]\n\n"
    except ClientGone:
        return
    except Refusal as refusal:  # the status is out already
        yield _event(refusal.body())


class _EventStream(StreamingResponse):
    """Tells when it is over, also if it never began."""

    def __init__(self, events: AsyncIterator[str], on_end: Any) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def make_app(engine: Engine, *, token: str, hosts: Collection[str] = (), limits: Limits | None = None) -> FastAPI:
    """The whole server as an ASGI application. `hosts`: names it may be called by, besides localhost and numbers."""
    limits = limits or Limits()
    service = Service(engine, limits)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="lowrank", docs_url=None, redoc_url=None, lifespan=running)
    app.state.service = service
    app.add_middleware(Guard, token=token, hosts=hosts, limits=limits)
    app.add_middleware(CountRequests, metrics=service.metrics)
    _add_errors(app)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.post("/v1/embeddings", response_model=None)
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return await service.embed(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(voice) for voice in engine.voices()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        for voice in engine.voices():
            if voice.name == name:
                return _model(voice)
        raise Refusal(404, f"there is no model {name!r} here", code="model_not_found", param="model")

    @app.post("/v1/adapters")
    async def publish(body: PublishRequest) -> dict[str, Any]:
        return _model(await asyncio.to_thread(engine.publish, body.name, body.path))

    @app.delete("/v1/adapters/{name:path}")
    async def withdraw(name: str) -> dict[str, Any]:
        await asyncio.to_thread(engine.withdraw, name)
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if engine.alive else {"status": "down"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(engine), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form. What went wrong inside is for the log, not for the client."""

    def say(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
        return say(refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return say(refused(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return say(Refusal(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return say(Refusal(500, "the server failed; its log says why"))


def _model(voice: Voice) -> dict[str, Any]:
    described = {"id": voice.name, "object": "model", "created": voice.created, "owned_by": "lowrank"}
    if voice.parent is None:
        return described
    return {**described, "parent": voice.parent, "version": voice.version, "resident": voice.resident}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
