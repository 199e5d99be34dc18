"""What the routes share: a request is parsed, admitted and answered, and its place is freed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lowrank.serve.api.generation_request import GenerationRequest, Reply
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.replies import usage
from lowrank.serve.api.request_lifecycle import ClientGone, ConcurrencyLimiter, RequestLifecycle
from lowrank.serve.api.requests import RequestBody, parse
from lowrank.serve.engine import ServeEngine
from lowrank.serve.limits import RequestLimits
from lowrank.serve.metrics import Metrics
from lowrank.serve.thread_pools import ThreadPools

CLIENT_GONE = 499
"""nginx' status for the log; nobody receives it."""
WARNING = "X-Lowrank-Warning"
"""The header that names options without effect."""
_UNREAD_SECONDS = 60.0
"""Beyond the time of the request, for a client that does not read what it is sent."""
Kind = TypeVar("Kind", bound=RequestBody)


class GenerationBody(Protocol):
    """The body of a request, of whichever API, that asks for answers."""

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """The prompts, the settings of generation, and the form of the reply. ApiError for what cannot be answered."""
        ...


class Service:
    """One engine behind all routes."""

    def __init__(self, engine: ServeEngine, limits: RequestLimits) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics()
        self.limiter = ConcurrencyLimiter(limits)
        self.pools = ThreadPools()

    async def read(self, kind: type[Kind], request: Request) -> Kind:
        """The body of a request, read beside the event loop. ApiError for what is wrong with it."""
        raw = await request.body()
        return await self.pools.run(len(raw), parse, kind, raw)

    async def serve(self, kind: type[Any], request: Request) -> Response:
        """Answer a request of some API (`kind`: a `RequestBody` that is also a `GenerationBody`)."""
        raw = await request.body()
        generation = await self.pools.run(len(raw), self._understand, kind, raw)
        return await self.answer(generation, request, len(raw))

    async def answer(self, generation: GenerationRequest, request: Request, size: int) -> Response:
        """A reply or a stream; whatever happens, what is not finished is cancelled and its place is free."""
        exchange = RequestLifecycle(self.limits, self.limiter, generation.count)
        headers = {WARNING: _warning(generation.ignored)} if generation.ignored else {}
        prompts = len(generation.questions)
        try:
            prompt_tokens = self.pools.run(size, self._submit, generation, exchange)
            exchange.answers += await asyncio.shield(asyncio.ensure_future(prompt_tokens))
            exchange.begin(request.receive)
            if generation.stream:
                events = _events(exchange, generation.reply, prompts, generation.usage)
                limit = self.limits.request_seconds + _UNREAD_SECONDS
                return _Stream(events, generation.reply.media_type, headers, limit, lambda: self._end(exchange))
            async for index, chunk in exchange.chunks():
                generation.reply.add(index, chunk)
            counts = usage((each.answer for each in exchange.answers), prompts)
            response = JSONResponse(generation.reply.whole(counts), headers=headers)
        except ClientGone:
            response = Response(status_code=CLIENT_GONE)
        except BaseException:
            self._end(exchange)
            raise
        self._end(exchange)
        return response

    def _understand(self, kind: type[Any], raw: bytes) -> GenerationRequest:
        requested: GenerationBody = parse(kind, raw)
        generation = requested.generation_request(self.engine, self.limits)
        generation.check(self.engine, self.limits)
        return generation

    def _submit(self, generation: GenerationRequest, exchange: RequestLifecycle) -> list[Any]:
        """In a thread. What was asked when something went wrong, or nobody waits any more, is cancelled."""
        answers: list[Any] = []
        try:
            for question in generation.questions:
                answers += self.engine.submit(generation.model, question, generation.configs)
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        if exchange.closed:
            for answer in answers:
                answer.cancel()
        return answers

    def _end(self, exchange: RequestLifecycle) -> None:
        cancelled = not exchange.complete
        seconds = exchange.close()
        if exchange.answers:
            answers = [each.answer for each in exchange.answers]
            prompt_tokens, completion_tokens = (
                sum(each.prompt_tokens for each in answers),
                sum(len(each.tokens) for each in answers),
            )
            self.metrics.count_answers(prompt_tokens, completion_tokens, seconds, exchange.first_token, cancelled)


async def _events(exchange: RequestLifecycle, reply: Reply, prompts: int, counted: bool) -> AsyncIterator[str]:
    """The stream; the usage in its end where that is wanted."""
    try:
        for event in reply.opening():
            yield reply.write(event)
        async for index, chunk in exchange.chunks():
            for event in reply.add(index, chunk):
                yield reply.write(event)
        counts = usage((each.answer for each in exchange.answers), prompts) if counted else None
        for event in reply.closing(counts):
            yield reply.write(event)
        if reply.ending:
            yield reply.ending
    except ClientGone:
        return
    except ApiError as refusal:  # the status is out already
        for event in reply.failed(refusal):
            yield reply.write(event)


class _Stream(StreamingResponse):
    """Tells when it is over, also if it never began, or if the client reads nothing."""

    def __init__(
        self,
        chunks: AsyncIterator[str],
        media_type: str,
        headers: dict[str, str],
        limit: float,
        on_end: Callable[[], Any],
    ) -> None:
        super().__init__(chunks, media_type=media_type, headers={"Cache-Control": "no-store", **headers})
        self._limit, self._on_end = limit, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._limit)
        except asyncio.TimeoutError:
            return  # uvicorn closes a connection whose answer is not whole
        finally:
            self._on_end()


def _warning(ignored: tuple[str, ...]) -> str:
    """Names come from requests, so only what a header may hold is left of them."""
    text = "without effect here: " + ", ".join(dict.fromkeys(ignored))
    return "".join(letter for letter in text[:1000] if " " <= letter <= "~")
