"""`POST /v1/embeddings`: texts as vectors."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lowrank.generate.embedding import Pooling
from lowrank.serve.api.completions import Token, listed
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.replies import Json
from lowrank.serve.api.requests import RequestBody
from lowrank.serve.api.service import CLIENT_GONE, Service
from lowrank.serve.limits import RequestLimits


class EmbeddingRequest(RequestBody):
    """What OpenAI defines, and a choice of its own."""

    model: str
    input: str | list[Token] | list[str] | list[list[Token]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Of each vector the first so many, scaled to length 1 again."""
    pooling: Pooling = "mean"
    """Not OpenAI's: the mean over a text's tokens, or the last one's state."""
    user: str | None = None

    def texts(self, limits: RequestLimits) -> list[str | np.ndarray]:
        """One or more. ApiError if there is none, or too many."""
        several = listed(self.input, "input")
        if len(several) > limits.texts_per_request:
            message = f"{len(several)} texts in one request; this server reads {limits.texts_per_request}"
            raise ApiError(400, message, param="input")
        return [text if isinstance(text, str) else np.asarray(text, np.int64) for text in several]


async def embed(service: Service, request: Request) -> Response:
    """One text after another, so that a client that leaves is noticed, and answers in progress go on."""
    body = await service.read(EmbeddingRequest, request)
    texts = body.texts(service.limits)
    service.limiter.acquire(1)
    started, seconds = time.monotonic(), service.limits.request_seconds
    vectors, tokens = [], 0
    try:
        for text in texts:
            if time.monotonic() - started > seconds:
                raise ApiError(504, f"the texts took more than {seconds:g} seconds", code="timeout")
            if await request.is_disconnected():
                return Response(status_code=CLIENT_GONE)
            size = len(text) * (1 if isinstance(text, str) else 8)
            vector_D, length = await service.pools.run(size, service.engine.embed, body.model, text, body.pooling)
            vectors.append(_shortened(vector_D, body.dimensions))
            tokens += length
    finally:
        service.limiter.release(1, time.monotonic() - started)
    return JSONResponse(embeddings(body.model, vectors, tokens, body.encoding_format))


def _shortened(vector_D: np.ndarray, dimensions: int | None) -> np.ndarray:
    if dimensions is None:
        return vector_D
    if dimensions > len(vector_D):
        message = f"dimensions: the model's vectors have {len(vector_D)}, {dimensions} are asked for"
        raise ApiError(400, message, param="dimensions")
    cut_D = vector_D[:dimensions]
    return cut_D / max(float(np.linalg.norm(cut_D)), 1e-12)


def embeddings(model: str, vectors: Sequence[np.ndarray], tokens: int, encoding: str) -> Json:
    """A reply of `/v1/embeddings`; base64 is of little-endian float32, as OpenAI's client asks for by itself."""
    data = []
    for index, vector_D in enumerate(vectors):
        raw = base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if encoding == "base64" else vector_D.tolist()
        data.append({"object": "embedding", "index": index, "embedding": raw})
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model, "data": data, "usage": counts}
