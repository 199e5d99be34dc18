"""A request of any API, parsed: the prompts, the settings of generation, and the form of the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lowrank.errors import LowrankError
from lowrank.generate.constraint import check_form
from lowrank.generate.request import GenerationConfig, TokenChunk
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engine import PromptType, ServeEngine
from lowrank.serve.limits import RequestLimits

Json = dict[str, Any]


class Reply(Protocol):
    """Made from the chunks of all answers, whole or as the events of a stream."""

    media_type: str
    """Of the stream."""
    ending: str
    """The stream's last words."""

    def opening(self) -> list[Json]:
        """The events before the first token."""
        ...

    def add(self, index: int, chunk: TokenChunk) -> list[Json]:
        """The events that a chunk of answer `index` makes."""
        ...

    def closing(self, counts: Json | None) -> list[Json]:
        """The events after the last token; `counts` where the client wants the usage."""
        ...

    def whole(self, counts: Json) -> Json:
        """After all chunks."""
        ...

    def failed(self, refusal: ApiError) -> list[Json]:
        """The events that tell of an error in the middle of a stream."""
        ...

    def write(self, event: Json) -> str:
        """An event on the wire."""
        ...


def refuse_many(count: int, limits: RequestLimits) -> None:
    """ApiError for more answers than one request may have, before anything is made for them."""
    if count > limits.answers_per_request:
        raise ApiError(
            400, f"{count} answers in one request; this server gives {limits.answers_per_request}", param="n"
        )


@dataclass(frozen=True)
class GenerationRequest:
    """One request. `count` answers are due, `n` to each of its questions."""

    model: str
    questions: Sequence[PromptType]
    config: GenerationConfig
    n: int
    stream: bool
    reply: Reply
    ignored: tuple[str, ...] = ()
    """Options without effect, told in a header."""
    usage: bool = True
    """A stream tells it in the end."""

    @property
    def count(self) -> int:
        """Answers that are due."""
        return len(self.questions) * self.n

    @property
    def configs(self) -> list[GenerationConfig]:
        """One for each of the `n` answers; draws of several differ, also with a seed."""
        seed = self.config.seed
        seeds = [None if seed is None else seed + index for index in range(self.n)]
        return [self.config.model_copy(update={"seed": each}) for each in seeds]

    def check(self, engine: ServeEngine, limits: RequestLimits) -> None:
        """ApiError for what no engine should be asked, so that all engines refuse the same."""
        refuse_many(self.count, limits)
        wrong = [token for token in self.config.logit_bias if not 0 <= token < engine.vocabulary]
        if wrong:
            message = f"logit_bias: the model has {engine.vocabulary} tokens, there is no {wrong[0]}"
            raise ApiError(400, message, param="logit_bias")
        try:
            check_form(self.config)
        except LowrankError as error:
            param = "response_format" if self.config.grammar is None else "tools"
            raise ApiError(400, str(error), param=param) from error
