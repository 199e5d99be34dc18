"""The chat template that a job's settings choose on a tokenizer, and what is found out about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lowrank.data import templates
from lowrank.data.chat.loss_mask import Sample
from lowrank.data.chat.template import ChatTemplate, RowRefused, without_marks
from lowrank.data.chat.template_shape import Shape, shape_of
from lowrank.data.chat.token_weights import encode
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.records import Message


def read_template(tokenizer: Any, config: DataConfig) -> tuple[ChatTemplate, Shape]:
    """The template and its shape. ModelError if there is none; ConfigError for a system prompt that it refuses."""
    text = templates.choose(tokenizer, config.chat_template)
    template = ChatTemplate(
        text,
        tokenizer,
        config.chat_template_kwargs,
        today=config.chat_template_date,
        split_special_tokens=config.split_special_tokens is not False,
        name=config.chat_template,
    )
    shape = shape_of(template, tokenizer.eos_token)
    if config.default_system is not None and shape.refuses_system:
        raise ConfigError(f"data.default_system: {shape.refuses_system}")
    return template, replace(shape, notices=(*shape.notices, *_melting(template, shape, tokenizer)))


def _melting(template: ChatTemplate, shape: Shape, tokenizer: Any) -> list[str]:
    """Tokenizing prompt and answer as one text (as everybody does) may differ from the prompt alone."""
    conversation = (Message("user", "question"), Message("assistant", "The"))
    try:
        requested = template.render(conversation[:1], generation_prompt=True).text + shape.header
        both = template.render(conversation).text
    except RowRefused:  # it insists on a system prompt
        return []
    alone, together = (each.ids for each in encode(tokenizer, [Sample(requested, ()), Sample(both, ())]))
    if not both.startswith(requested) or together[: len(alone)] == alone:
        return []
    return [
        "the last token of the generation prompt and the first of an answer melt together in training, and cannot "
        "when the model answers; a template whose prompt does not end in white space avoids that"
    ]


def chosen_templates(settings: Mapping[str, DataConfig], tokenizer: Any) -> dict[str, str]:
    """`{name: Jinja source}` of those whose settings choose another chat template than the tokenizer's own; one that
    this tokenizer cannot have is in nobody's use (plain text needs none)."""
    chosen: dict[str, str] = {}
    for name, data in settings.items():
        if data.chat_template is not None:
            with suppress(ConfigError, ModelError):
                chosen[name] = without_marks(templates.choose(tokenizer, data.chat_template))
    return chosen
