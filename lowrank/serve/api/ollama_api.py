"""Ollama's `/api/chat`, `generate`, `tags`, `ps`, `show` and `version` in a thin form, behind the token; the others
are refused in words.

After Ollama's docs/api.md. Defaults of the draws are Ollama's (temperature 0.8, top_k 40, top_p 0.9, repeat_penalty
1.1), which are not OpenAI's.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

import lowrank
from lowrank.data.chat.thoughts import thoughts_of
from lowrank.serve.api.generation_request import GenerationRequest, Json
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.ollama_reply import OllamaReply
from lowrank.serve.api.requests import ChatRequest, RequestBody, refused
from lowrank.serve.api.service import Service
from lowrank.serve.engine import ImageEngine, ServedModel, ServeEngine
from lowrank.serve.folders import unknown_model
from lowrank.serve.limits import RequestLimits

_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
_DEFAULTS: Json = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
_NEVER = "9999-12-31T23:59:59Z"
"""When a model that is always there goes."""
_CHANGES = {"mirostat": 0, "typical_p": 1.0, "tfs_z": 1.0}
"""Options that would change answers and are not to be had; the values at which they do not."""


class OllamaRequest(RequestBody):
    """What both kinds of question share."""

    model: str
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    stream: bool = True
    keep_alive: Any = None
    think: bool | str | None = None

    @property
    def name(self) -> str:
        """Ollama's clients add a tag."""
        return self.model.removesuffix(":latest")

    def sampling_options(self) -> tuple[Json, list[str]]:
        """The options in our words, and those without effect."""
        given = {name: value for name, value in self.options.items() if value is not None}
        fields = {**_DEFAULTS, **{name: given.pop(name) for name in _SAME if name in given}}
        if "repeat_penalty" in given:
            fields["repetition_penalty"] = given.pop("repeat_penalty")
        if (most := given.pop("num_predict", -1)) not in (-1, -2):
            fields["max_tokens"] = most
        for name, neutral in _CHANGES.items():
            if given.get(name, neutral) != neutral:
                raise ApiError(400, f"unsupported option: options.{name}", param=f"options.{name}")
        fields |= {"response_format": _format(self.format), "keep_alive": self.keep_alive}
        if isinstance(self.think, str):
            fields["reasoning_effort"] = self.think
        elif self.think is not None:
            fields["enable_thinking"] = self.think
        return fields, [f"options.{name}" for name in given]

    def chat(
        self, messages: list[Json], tools: list[Json], wrap: str, engine: ServeEngine, limits: RequestLimits
    ) -> GenerationRequest:
        """What is generated for a chat."""
        fields, ignored = self.sampling_options()
        try:
            body = ChatRequest.model_validate({"model": self.name, "messages": messages, "tools": tools, **fields})
        except ValidationError as error:
            raise refused(error.errors(include_url=False)) from error
        chat = body.understood(engine, limits)
        reply = OllamaReply(self.model, wrap, chat.reader() if chat.reader else None, chat.thoughts)
        return GenerationRequest(
            self.name, [chat.question], chat.config, 1, self.stream, reply, (*chat.ignored, *ignored)
        )


class OllamaChat(OllamaRequest):
    """`POST /api/chat`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = Field(default_factory=list)

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """As our own chat."""
        return self.chat([_message(each) for each in self.messages], self.tools, "message", engine, limits)


class OllamaGenerate(OllamaRequest):
    """`POST /api/generate`: a prompt through the chat template, or as it is (`raw`)."""

    prompt: str
    system: str | None = None
    raw: bool = False
    images: list[str] | None = None

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """As a chat of one turn, or as a text to go on with."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.raw and self.images:
            raise ApiError(400, "images: a raw prompt has no turn to show them in; leave `raw` out", param="images")
        question = _message({"role": "user", "content": self.prompt, "images": self.images})
        generation = self.chat([*system, question], [], "response", engine, limits)
        if not self.raw:
            return generation
        return replace(generation, questions=[self.prompt])


class ShowRequest(RequestBody):
    """`POST /api/show`."""

    model: str = ""
    name: str = ""
    verbose: bool = False


def add_ollama(app: FastAPI, service: Service) -> None:
    """The routes."""
    engine = service.engine

    @app.post("/api/chat", response_model=None)
    async def chat(request: Request) -> Response:
        return await service.serve(OllamaChat, request)

    @app.post("/api/generate", response_model=None)
    async def generate(request: Request) -> Response:
        return await service.serve(OllamaGenerate, request)

    @app.get("/api/tags")
    async def tags() -> Json:
        return {"models": [_described(served, engine) for served in engine.served_models()]}

    @app.get("/api/version")
    async def our_version() -> Json:
        return {"version": lowrank.__version__}

    @app.get("/api/ps")
    async def running() -> Json:
        """What is in memory, for as long as the server runs."""
        resident = [_described(served, engine) for served in engine.served_models() if served.resident]
        return {"models": [{**each, "size_vram": 0, "expires_at": _NEVER, "context_length": 0} for each in resident]}

    @app.post("/api/embed", response_model=None)
    @app.post("/api/embeddings", response_model=None)
    async def embed(request: Request) -> Response:
        raise ApiError(501, f"{request.url.path}: embeddings are given at POST /v1/embeddings, in OpenAI's form")

    for unserved in ("pull", "push", "create", "copy", "delete"):
        app.add_api_route(f"/api/{unserved}", _unserved, methods=["POST", "DELETE"], response_model=None)

    @app.post("/api/show", response_model=None)
    async def show(request: Request) -> Response:
        body = await service.read(ShowRequest, request)
        name = (body.model or body.name).removesuffix(":latest")
        served_models = {served.name: served for served in engine.served_models()}
        if name not in served_models:
            raise unknown_model(name, list(served_models))
        template = await service.pools.run(0, engine.chat_template, name)
        able = ["completion", *(["tools"] if "tools" in template else [])]
        able += ["vision"] if isinstance(engine, ImageEngine) and engine.image_problem is None else []
        able += ["thinking"] if thoughts_of(template, {}) else []
        shown = {"template": template, "details": _described(served_models[name], engine)["details"], "model_info": {}}
        return JSONResponse({**shown, "modelfile": "", "parameters": "", "license": "", "capabilities": able})


async def _unserved(request: Request) -> Response:
    raise ApiError(
        501, f"{request.url.path}: this server answers with the models it was started with; POST /v1/adapters adds one"
    )


def _described(served: ServedModel, engine: ServeEngine) -> Json:
    when = datetime.fromtimestamp(served.created, timezone.utc).isoformat()
    details = {"format": engine.name, "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
    details["parent_model"] = served.parent or ""
    about = {"modified_at": when, "size": 0, "digest": "", "details": details}
    return {"name": served.name, "model": served.name, **about}


def _message(message: Json) -> Json:
    """Ollama's in OpenAI's words: pictures are base64 beside the text, and come before it."""
    renamed = {"thinking": "reasoning_content", "tool_name": "name"}
    found = {renamed.get(key, key): value for key, value in message.items() if key != "images"}
    if not message.get("images"):
        return found
    if not isinstance(message["images"], list):
        raise ApiError(400, "messages: images: expected a list of base64", param="messages")
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/any;base64,{each}"}} for each in message["images"]]
    return {**found, "content": [*parts, {"type": "text", "text": found.get("content") or ""}]}


def _format(given: str | Json | None) -> Json | None:
    if not given:
        return None
    if given == "json":
        return {"type": "json_object"}
    if isinstance(given, str):
        raise ApiError(400, f'format: expected "json" or a schema, got {given[:60]!r}', param="format")
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": given}}
