"""Tokenizes what a client sent; what is surely too long is refused before it is rendered or tokenized whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from lowrank.data.chat.rendering import Renderer
from lowrank.errors import LowrankError
from lowrank.records import Conversation
from lowrank.segments import Media
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engine import ChatPrompt, PromptType

_PIECE = 8192
"""Characters that are tokenized at once, to see whether a text is too long."""
_EXACTLY = 1 << 16
"""Characters that are tokenized in any case: then the message can say how many tokens there are."""
_SEAM = 16
"""Tokens that a piece may have beyond its share of the whole: words cut in two, white space that joins."""


def tokens_of(
    question: PromptType,
    renderer: Renderer,
    tokenizer: Any,
    vocabulary: int,
    reach: int | None,
    *,
    framed: bool = False,
) -> np.ndarray:
    """(L) The tokens of `tokens_and_media`, for engines that are shown no pictures: ApiError where there are some."""
    token_L, media = tokens_and_media(question, renderer, tokenizer, vocabulary, reach, framed=framed)
    if media is not None:
        raise ApiError(400, "messages: unsupported content image_url: this engine reads text", param="messages")
    return token_L


def tokens_and_media(
    question: PromptType,
    renderer: Renderer,
    tokenizer: Any,
    vocabulary: int,
    reach: int | None,
    *,
    framed: bool = False,
) -> tuple[np.ndarray, Media | None]:
    """(L) A chat through its template, a text as one that goes on (no EOS behind it), tokens as they are; and the
    pictures of a chat.

    `framed`: a text with all that the tokenizer puts around one; models for embeddings look at the EOS they add.
    ApiError for tokens the model does not have, for a chat that the template refuses, and for what is surely longer
    than `reach` tokens.
    """
    if reach is not None:
        refuse_too_long(question, reach, lambda text: len(_read(text, tokenizer, add_special_tokens=False)), renderer)
    try:
        if isinstance(question, Conversation):
            segment = _renderer_for(question, renderer).prompt_segment(question)
            return segment.token_L, segment.media
        if isinstance(question, str):
            question = np.asarray(_read(question, tokenizer), np.int64) if framed else renderer.plain_prompt(question)
    except LowrankError as error:
        raise ApiError(400, str(error), param="messages") from error
    wrong = question[(question < 0) | (question >= vocabulary)]
    if len(wrong):
        raise ApiError(400, f"prompt: the model has {vocabulary} tokens, there is no {wrong[0]}", param="prompt")
    return question, None


def refuse_too_long(
    question: PromptType, reach: int, count: Callable[[str], int], renderer: Renderer | None = None
) -> None:
    """ApiError for what is surely longer than `reach` tokens, in time that does not grow with its length.

    `count`: tokens of a text of some thousand characters.
    """
    if isinstance(question, np.ndarray):
        if len(question) >= reach:
            raise too_long(f"{len(question)}", reach, question)
        return
    if isinstance(question, Conversation) and len(question.messages) > reach:
        message = (
            f"the conversation has {len(question.messages)} messages and the model's maximum context length is {reach} "
            "tokens"
        )
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    parts = [question] if isinstance(question, str) else list(_written(question, renderer))
    if sum(map(len, parts)) <= max(_EXACTLY, 4 * reach):
        return
    if (least := _least(parts, count, reach)) > reach:
        raise too_long(f"at least {least}", reach, question)


def too_long(length: str, reach: int, question: PromptType) -> ApiError:
    """The error for a prompt that fills the context by itself."""
    message = f"the conversation has {length} tokens and the model's maximum context length is {reach}"
    param = "messages" if isinstance(question, Conversation) else "prompt"
    return ApiError(400, message, code="context_length_exceeded", param=param)


def _least(parts: Iterable[str], count: Callable[[str], int], reach: int) -> int:
    """Tokens the texts have at the least, counted no further than `reach`."""
    found = 0
    for text in parts:
        for start in range(0, len(text), _PIECE):
            found += max(0, count(text[start : start + _PIECE]) - _SEAM)
            if found > reach:
                return found
    return found


def _written(question: Conversation, renderer: Renderer | None) -> Iterable[str]:
    """What every template writes as it is: contents, but for the space around them and for thoughts of the past."""
    for message in question.messages:
        yield message.content.rpartition("</think>")[2].strip()
    if question.tools and renderer is not None:
        try:
            shows_tools = "tools" in renderer.chat_template
        except LowrankError:
            return
        if shows_tools:
            yield from (json.dumps(tool, ensure_ascii=False) for tool in question.tools)


def _renderer_for(question: Conversation, renderer: Renderer) -> Renderer:
    if not isinstance(question, ChatPrompt) or not question.variables:
        return renderer
    return _with_variables(renderer, json.dumps(dict(question.variables), sort_keys=True))


@lru_cache(maxsize=16)
def _with_variables(renderer: Renderer, variables: str) -> Renderer:
    """It learns the shape of what the template writes with them, which takes a while."""
    known = renderer.config.chat_template_kwargs
    changed = {"chat_template_kwargs": {**known, **json.loads(variables)}}
    return Renderer(renderer.tokenizer, renderer.config.model_copy(update=changed))


def _read(text: str, tokenizer: Any, **options: Any) -> list[int]:
    return tokenizer(text, verbose=False, **options)["input_ids"]
