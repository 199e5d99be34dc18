"""Records as segments: chat template, tokens, loss weights, maximum length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from lowrank.data import templates
from lowrank.data.chat import truncation
from lowrank.data.chat.loss_mask import Sample, samples_of
from lowrank.data.chat.placeholders import media_in, placeholder_names, put_in
from lowrank.data.chat.template import ChatTemplate, RowRefused, without_marks
from lowrank.data.chat.template_shape import Shape, shape_of, with_call_ids
from lowrank.data.chat.token_weights import frame_of, weigh, without_tail
from lowrank.data.config import DataConfig
from lowrank.data.foreign import Pieces, Spelled
from lowrank.data.formats.turns import think
from lowrank.errors import ConfigError, DataError, LowrankError, ModelError
from lowrank.foreign_files import DEEPEST_JSON, is_deeper
from lowrank.media.processor import processor_of
from lowrank.records import KIND_NAMES, THOUGHTS, Conversation, Message, Preference, Prompted, Record, Text
from lowrank.segments import CHOSEN, PLAIN, REJECTED, Segment

_ROWS_AT_ONCE = 1000
"""Rows tokenized in one call, which the tokenizer spreads over the processor's cores."""


@dataclass(frozen=True)
class Rendering:
    """What one record became."""

    segments: tuple[Segment, ...]
    """Empty when the record is dropped. The two answers of a preference share a `pair`; others stand alone."""
    problem: str | None = None
    """Why it was dropped, in plain words."""
    truncated_tokens: int = 0
    """Tokens cut off at the end of its segments."""
    refused: bool = False
    """The settings ask for an error here (`on_too_long: error`), not for a dropped record."""
    spelled: tuple[str, ...] = ()
    """Control tokens of the model that its texts spell, and that are read as text."""

    @property
    def samples(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments as samples of a dataloader: a pair is one, and every other segment is one."""
        if not self.segments:
            return ()
        return (self.segments,) if self.segments[0].pair >= 0 else tuple((segment,) for segment in self.segments)


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
        stops = {self.tokenizer.eos_token_id, *getattr(self.tokenizer, "declared_answer_ends", ())}
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
            written = [self._write(record) for record in rows]
            encoded = self._encode(
                [sample for samples in written if not isinstance(samples, str) for sample in samples]
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
            only = {"image": "reads text only", "video": "watches none", "audio": "does not hear"}[unable]
            raise DataError(f"the conversation has {KIND_NAMES[unable]}, and this model {only}")
        (sample,) = _encodable([self._prompt_sample(conversation)])
        segment = weigh(sample, self._encode([sample])[0])
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

    @property
    def _template(self) -> tuple[ChatTemplate, Shape]:
        if self._chat is None:
            text = templates.choose(self.tokenizer, self.config.chat_template)
            template = ChatTemplate(
                text,
                self.tokenizer,
                self.config.chat_template_kwargs,
                today=self.config.chat_template_date,
                split_special_tokens=self.config.split_special_tokens is not False,
                name=self.config.chat_template,
            )
            shape = shape_of(template, self.tokenizer.eos_token)
            if self.config.default_system is not None and shape.refuses_system:
                raise ConfigError(f"data.default_system: {shape.refuses_system}")
            self._chat = template, replace(shape, notices=(*shape.notices, *self._melting(template, shape)))
        return self._chat

    def _melting(self, template: ChatTemplate, shape: Shape) -> list[str]:
        """Tokenizing prompt and answer as one text (as everybody does) may differ from the prompt alone."""
        conversation = (Message("user", "question"), Message("assistant", "The"))
        try:
            requested = template.render(conversation[:1], generation_prompt=True).text + shape.header
            both = template.render(conversation).text
        except RowRefused:  # it insists on a system prompt
            return []
        alone, together = (each.ids for each in self._encode([Sample(requested, ()), Sample(both, ())]))
        if not both.startswith(requested) or together[: len(alone)] == alone:
            return []
        return [
            "the last token of the generation prompt and the first of an answer melt together in training, and cannot "
            "when the model answers; a template whose prompt does not end in white space avoids that"
        ]

    def _write(self, record: Record) -> list[Sample] | str:
        """The texts of a record, or why there are none."""
        try:
            return _encodable(self._samples_of(record))
        except RowRefused as error:
            return str(error)

    def _samples_of(self, record: Record) -> list[Sample]:
        if isinstance(record, Text):
            return self._plain(record)
        if isinstance(record, Conversation):
            return self._conversation(record)
        if isinstance(record, Prompted):
            if media_in(record.prompt):
                raise RowRefused(
                    "it has more than text, and answers that the model gives itself are to text alone so far"
                )
            return [self._prompt_sample(record.prompt)]
        if isinstance(record, Preference):
            answers = (record.chosen, record.rejected)
            return [
                self._answer(replace(record.prompt, messages=(*record.prompt.messages, answer))) for answer in answers
            ]
        return [self._answer(record.conversation)]

    def _plain(self, record: Text) -> list[Sample]:
        if not record.text.strip():
            raise RowRefused("the text is empty")
        spelled = ()
        if self.config.split_special_tokens:
            found = Spelled(self.tokenizer, "").anywhere.finditer(record.text)
            spelled = tuple(match.span() for match in found)
        return [Sample(record.text, ((0, len(record.text)),), spelled)]

    def _conversation(self, conversation: Conversation) -> list[Sample]:
        answers = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not answers:
            raise RowRefused("no answer: the conversation has no turn of the assistant")
        considered = answers[-1:] if self.config.mask_history else answers
        learned = [place for place in considered if _to_learn(conversation.messages[place])]
        if not learned:
            empty = not any(_has_content(conversation.messages[place]) for place in considered)
            raise RowRefused("the answer is empty" if empty else "none of its answers is to be learned (weight 0)")
        return self._samples(conversation, learned, prompt_too=self.config.train_on_prompt)

    def _answer(self, conversation: Conversation) -> Sample:
        """The last turn alone is learned, as preference objectives compare it."""
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise RowRefused("no answer: the last turn is not the assistant's")
        if not _has_content(conversation.messages[-1]):
            raise RowRefused("the answer is empty")
        return self._samples(conversation, [len(conversation.messages) - 1], prompt_too=False)[0]

    def _samples(self, conversation: Conversation, learned: Sequence[int], prompt_too: bool) -> list[Sample]:
        template, shape = self._template
        added = self._as_read(conversation)
        shift = len(added.messages) - len(conversation.messages)
        samples = samples_of(template, shape, added, [place + shift for place in learned], prompt_too=prompt_too)
        return [put_in(each, media_in(added, each.num_messages), self._processor) for each in samples]

    @property
    def _processor(self) -> Any:
        """The model's processor of media; None for one of text alone."""
        return processor_of(self.tokenizer)

    def takes(self, kind: str) -> bool:
        """Whether the model takes media of this kind."""
        processor = self._processor
        return processor is not None and kind in processor.kinds

    def _as_read(self, conversation: Conversation) -> Conversation:
        """With the settings' system prompt, thoughts where this template can write them, and ids if it needs some."""
        _refuse_deep(conversation)
        conversation, shape = self._with_system(conversation), self._template[1]
        messages = with_call_ids(conversation.messages, shape.call_ids)
        if shape.ignores_thoughts:
            messages = tuple(map(_thinking_aloud, messages))
        return replace(conversation, messages=messages)

    def _with_system(self, conversation: Conversation) -> Conversation:
        system = self.config.default_system
        if system is None or any(message.role == "system" for message in conversation.messages):
            return conversation
        return replace(conversation, messages=(Message("system", system), *conversation.messages))

    def _encode(self, samples: Sequence[Sample]) -> list[Any]:
        """One encoding each (`ids`, `char_to_token`); what only spells control tokens as text.

        Never with the tokenizer's own special tokens: a chat template writes BOS itself, or means to have none."""
        if not samples:
            return []
        encodings = self.tokenizer(
            [sample.text for sample in samples],
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).encodings
        return [
            Pieces(self.tokenizer, sample.text, sample.spelled) if sample.spelled else encoding
            for sample, encoding in zip(samples, encodings)
        ]

    def _prompt_sample(self, conversation: Conversation) -> Sample:
        template, shape = self._template
        conversation = self._as_read(conversation)
        requested = template.render(conversation.messages, conversation.tools, generation_prompt=True)
        sample = Sample(requested.text + shape.header, (), requested.spelled)
        return put_in(sample, media_in(conversation), self._processor)

    def _finish(self, record: Record, parts: list[Segment]) -> Rendering:
        if isinstance(record, Prompted):
            return self._render_prompt(record, parts[0])
        if isinstance(record, Text):
            parts = [self._framed(part) for part in parts]
        elif isinstance(record, Preference):
            parts = [replace(without_tail(part), pair=0, role=role) for part, role in zip(parts, (CHOSEN, REJECTED))]
        else:
            role = PLAIN if isinstance(record, Conversation) else (CHOSEN if record.desirable else REJECTED)
            parts = [replace(without_tail(part), role=role) for part in parts]
        if not all(part.weight_L.any() for part in parts):
            return Rendering((), "no token of it can be learned")
        return self._fit(parts, splittable=isinstance(record, (Text, Conversation)))

    def _render_prompt(self, record: Prompted, part: Segment) -> Rendering:
        """A prompt is taken whole or not at all: without its beginning or end it is not what anybody asked."""
        limit = self.config.max_length
        if len(part) > limit:
            refused = self.config.on_too_long == "error"
            return Rendering((), truncation.too_long(len(part), limit), refused=refused)
        return Rendering((replace(part, prompted=record),))

    def _fit(self, parts: list[Segment], splittable: bool) -> Rendering:
        limit, policy = self.config.max_length, self.config.on_too_long
        longest = max(map(len, parts))
        if longest <= limit:
            return Rendering(tuple(parts))
        if policy in ("drop", "error"):
            return Rendering((), truncation.too_long(longest, limit), refused=policy == "error")
        if policy == "split" and splittable:
            pieces = [piece for part in parts for piece in truncation.split(part, limit, self._prefix)]
            return Rendering(tuple(pieces), None if pieces else truncation.too_long(longest, limit))
        cut = [truncation.truncate(part, limit) for part in parts]
        kept = [segment for segment, _ in cut if segment is not None]
        if not kept or (len(kept) < len(parts) and not splittable):  # a pair needs both its answers
            return Rendering((), f"{truncation.too_long(longest, limit)}, and its prompt alone fills that")
        if len(kept) == 2 and kept[0].pair >= 0 and np.array_equal(kept[0].token_L, kept[1].token_L):
            what = truncation.too_long(longest, limit)
            return Rendering((), f"equal answers after cutting: {what}, and chosen and rejected differ only beyond")
        lost = sum(len(part) for part in parts) - sum(map(len, kept))
        return Rendering(tuple(kept), truncated_tokens=lost)

    def _framed(self, part: Segment) -> Segment:
        """Plain text between what the tokenizer puts before it (BOS, never twice) and a learned EOS."""
        tokens, prefix, end = part.token_L, self._prefix, self.tokenizer.eos_token_id
        if len(prefix) and not np.array_equal(tokens[: len(prefix)], prefix):
            tokens = np.concatenate([prefix, tokens])
        if end is not None and len(part) and tokens[-1] != end:
            tokens = np.concatenate([tokens, np.asarray([end], tokens.dtype)])
        weights = np.ones(len(tokens), np.float32)
        weights[: max(1, len(prefix))] = 0.0
        return Segment(tokens, weights)


def _to_learn(message: Message) -> bool:
    return message.trained and _has_content(message)


def _has_content(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls or message.thought)


def _encodable(samples: list[Sample]) -> list[Sample]:
    """RowRefused for a text with half of a character, which JSON can hold and no tokenizer reads."""
    for sample in samples:
        try:
            sample.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowRefused("half of a character (a lone surrogate): the text was cut within an emoji") from error
    return samples


def _refuse_deep(conversation: Conversation) -> None:
    """RowRefused for values that neither a template nor JSON could write; whoever made them, it is this row's fault."""
    held = [*conversation.tools]
    for message in conversation.messages:
        held += [*message.fields.values(), *message.tool_calls]
    if any(is_deeper(value, DEEPEST_JSON) for value in held):
        raise RowRefused(f"a call, tool or field of its turns is nested more than {DEEPEST_JSON} deep")


def _thinking_aloud(message: Message) -> Message:
    """A thought as `<think>` at the beginning of what is said."""
    if not message.thought:
        return message
    rest = {key: value for key, value in message.fields.items() if key not in THOUGHTS}
    return replace(message, content=think(message.thought) + message.content, fields=rest)


def chosen_templates(settings: Mapping[str, DataConfig], tokenizer: Any) -> dict[str, str]:
    """`{name: Jinja source}` of those whose settings choose another chat template than the tokenizer's own; one that
    this tokenizer cannot have is in nobody's use (plain text needs none)."""
    chosen: dict[str, str] = {}
    for name, data in settings.items():
        if data.chat_template is not None:
            with suppress(ConfigError, ModelError):
                chosen[name] = without_marks(templates.choose(tokenizer, data.chat_template))
    return chosen
