"""Renderers of made tokenizers, conversations for them, and what of a segment is learned."""

from __future__ import annotations

from typing import Any

from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.records import Conversation, Message
from lowrank.segments import Segment
from tests.data.made_tokenizers import tokenizer_of, trl_template

STEADY = ["qwen2_5", "llama3", "phi3", "gemma", "deepseekv3", "cohere"]
"""Families that write earlier answers as they write the last one, and end them with a token."""
END = {
    "qwen2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
TURNS = ("What is 1 + 2?", "It is 3 🙂🚀", "And 你好?", "Hello,\n\nworld.", "Thanks", "法国的首都是巴黎。")


def chat(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message("assistant" if place % 2 else "user", content) for place, content in enumerate(contents)]
    return Conversation(((Message("system", system),) if system is not None else ()) + tuple(messages))


def dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def renderer_of(family: str, template: str | None = None, **settings: Any) -> Renderer:
    made = {key: settings.pop(key) for key in ("metaspace", "adds_bos") if key in settings}
    tokenizer = tokenizer_of(family, template or trl_template(family), **made)
    return Renderer(tokenizer, DataConfig(**settings))


def only(rendering: Rendering) -> Segment:
    assert rendering.problem is None
    assert len(rendering.segments) == 1
    return rendering.segments[0]


def learned(renderer: Renderer, segment: Segment) -> list[str]:
    return [text for text, weight in renderer.show(segment) if weight]
