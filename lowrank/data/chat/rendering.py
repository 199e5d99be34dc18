"""Records as segments: chat template, tokens, loss weights, maximum length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from lowrank.data.chat import truncation
from lowrank.data.chat.chosen_template import read_template
from lowrank.data.chat.placeholders import media_in, placeholder_names
from lowrank.data.chat.record_samples import RecordSamples
from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.chat.template import ChatTemplate
from lowrank.data.chat.template_shape import Shape
from lowrank.data.chat.token_weights import encode, frame_of, framed, weigh, without_tail
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, DataError, LowrankError, ModelError
from lowrank.media.processor import processor_of
from lowrank.records import KIND_NAMES, Conversation, Preference, Prompted, Record, Text
from lowrank.segments import CHOSEN, PLAIN, REJECTED, Segment

_ROWS_AT_ONCE = 1000
"""Rows tokenized in one call, which the tokenizer spreads over the processor's cores."""


class Renderer:
    """Turns records into segments, for one tokenizer and the data settings of one job.

    chat_template   the Jinja source in use, the same that goes into exports
    stop_tokens     ids that end an answer
    notices         what a person should know about the template
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        """Raises ModelError for a slow tokenizer, ConfigError for settings that exclude each other.

        The chat template is looked for when the first conversation comes: plain text needs none.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which characters a token stands for, "
                "so answers cannot be told from prompts\n  use the fast one (a model folder with tokenizer.json)"
            )
        if config.train_on_prompt and config.mask_history:
            raise ConfigError("data: train_on_prompt and mask_history exclude each other; choose one")
        self.tokenizer = tokenizer
        self.config = config
        self._prefix = frame_of(tokenizer)
        self._chat: tuple[ChatTemplate, Shape] | None = None
        self._samples = RecordSamples(tokenizer, config, lambda: self._template)

    @property
    def chat_template(self) -> str:
        """The Jinja source in use. Raises ModelError if there is none."""
        return self._template[0].text

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know about the chat template, in whole sentences; nothing before one was needed."""
        return self._chat[1].notices if self._chat else ()

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids at which an answer ends: EOS, what the model's files declare, and what the chat template puts after any
        kind of answer (plain, with a thought, a call of a tool)."""
        stops = {self.tokenizer.eos_token_id, *getattr(self.tokenizer, "declared_stop_tokens", ())}
        if self._chat is not None or self.tokenizer.chat_template or self.config.chat_template:
            template, shape = self._template
            ends = [*template.control.findall(shape.closing)[-1:], *shape.added.values(), *shape.call_ends]
            stops |= {self.tokenizer.convert_tokens_to_ids(token) for token in ends}
        return frozenset(stop for stop in stops if stop is not None)

    def reads(self, field: str) -> bool:
        """Whether the chat template knows a field of turns, whose name comes last in `messages[].field`."""
        name = field.rpartition(".")[2]
        try:
            text = self._template[0].text
        except LowrankError:
            return False
        return name.isidentifier() and re.search(rf"\b{re.escape(name)}\b", text) is not None

    def render(self, record: Record) -> Rendering:
        """One record; see `render_many`."""
        return next(self.render_many([record]))

    def render_many(self, records: Iterable[Record]) -> Iterator[Rendering]:
        """One rendering per record, in order, read and tokenized a thousand at a time.

        Raises ModelError if conversations come and there is no usable chat template.
        """
        source = iter(records)
        while rows := list(islice(source, _ROWS_AT_ONCE)):
            written = [self._samples.of(record) for record in rows]
            encoded = encode(
                self.tokenizer, [sample for samples in written if not isinstance(samples, str) for sample in samples]
            )
            at = 0
            for record, samples in zip(rows, written):
                if isinstance(samples, str):
                    yield Rendering((), samples)
                    continue
                parts = [weigh(sample, encoded[at + place]) for place, sample in enumerate(samples)]
                at += len(samples)
                spelled = {sample.text[start:end]: None for sample in samples for start, end in sample.spelled}
                yield replace(self._finish(record, parts), spelled=tuple(filter(None, spelled)))

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """(L) int64 tokens of a conversation that waits for an answer, ending in the generation prompt.

        Raises DataError if the chat template refuses it, and where it has media, which tokens alone do not show.
        """
        if media_in(conversation):
            raise DataError("the conversation has more than text, and it is asked of what reads text alone")
        return self.prompt_segment(conversation).token_L

    def prompt_segment(self, conversation: Conversation) -> Segment:
        """As `prompt`, with the media of the conversation."""
        unable = next((each.kind for each in media_in(conversation) if not self.takes(each.kind)), None)
        if unable is not None:
            only = {"image": "reads text only", "video": "takes none", "audio": "takes none"}[unable]
            raise DataError(f"the conversation has {KIND_NAMES[unable]}, and this model {only}")
        sample = self._samples.prompt(conversation)
        segment = weigh(sample, encode(self.tokenizer, [sample])[0])
        return replace(segment, token_L=segment.token_L.astype(np.int64))

    def plain_prompt(self, text: str) -> np.ndarray:
        """(L) int64 tokens of a text to be gone on with: behind what the tokenizer puts before one (BOS), and without
        an EOS that it may put after it."""
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        known = len(self._prefix) and np.array_equal(tokens[: len(self._prefix)], self._prefix)
        return tokens if known else np.concatenate([self._prefix.astype(np.int64), tokens])

    def show(self, segment: Segment) -> list[tuple[str, float]]:
        """The segment as text in pieces of equal loss weight, `[(text, weight), ...]`."""
        named = placeholder_names(segment.media)
        changes = {
            *(np.flatnonzero(np.diff(segment.weight_L)) + 1).tolist(),
            *(edge for span in named for edge in span),
        }
        pieces, shown = [], ""
        for start, end in pairwise(sorted({0, len(segment), *changes})):
            text = self.tokenizer.decode(
                segment.token_L[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if end < len(segment):
                text = text.rstrip("\ufffd")  # half a character: the rest comes with the next piece
            pieces.append((named.get((start, end), text[len(shown) :]), float(segment.weight_L[start])))
            shown = text
        return pieces

    def takes(self, kind: str) -> bool:
        """Whether the model takes media of this kind."""
        processor = processor_of(self.tokenizer)
        return processor is not None and kind in processor.kinds

    @property
    def _template(self) -> tuple[ChatTemplate, Shape]:
        if self._chat is None:
            self._chat = read_template(self.tokenizer, self.config)
        return self._chat

    def _finish(self, record: Record, parts: list[Segment]) -> Rendering:
        limit, policy = self.config.max_length, self.config.on_too_long
        if isinstance(record, Prompted):
            return truncation.fit_prompt(replace(parts[0], prompted=record), limit, policy)
        if isinstance(record, Text):
            parts = [framed(part, self._prefix, self.tokenizer.eos_token_id) for part in parts]
        elif isinstance(record, Preference):
            parts = [replace(without_tail(part), pair=0, role=role) for part, role in zip(parts, (CHOSEN, REJECTED))]
        else:
            role = PLAIN if isinstance(record, Conversation) else (CHOSEN if record.desirable else REJECTED)
            parts = [replace(without_tail(part), role=role) for part in parts]
        if not all(part.weight_L.any() for part in parts):
            return Rendering((), "no token of it can be learned")
        splittable = isinstance(record, (Text, Conversation))
        return truncation.fit(parts, limit, policy, self._prefix, splittable=splittable)
