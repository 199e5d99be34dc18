"""The texts of a record, with what of them is learned: a chat template is applied, or plain text taken as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowrank.data.chat.loss_mask import Sample, samples_of
from lowrank.data.chat.placeholders import media_in, put_in
from lowrank.data.chat.template import ChatTemplate, RowRefused
from lowrank.data.chat.template_shape import Shape, with_call_ids
from lowrank.data.config import DataConfig
from lowrank.data.formats.turns import think
from lowrank.data.special_token_escaping import SpecialTokenGuard
from lowrank.foreign_files import DEEPEST_JSON, is_deeper
from lowrank.media.processor import processor_of
from lowrank.records import THOUGHTS, Conversation, Message, Preference, Prompted, Record, Text


class RecordSamples:
    """Writes records as texts, for one tokenizer and the data settings of one job.

    `template`: gives the chat template and its shape; asked when the first conversation comes.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, template: Callable[[], tuple[ChatTemplate, Shape]]) -> None:
        self._tokenizer, self._config, self._template = tokenizer, config, template

    def of(self, record: Record) -> list[Sample] | str:
        """The texts of a record, or why there are none."""
        try:
            return _encodable(self._samples_of(record))
        except RowRefused as error:
            return str(error)

    def prompt(self, conversation: Conversation) -> Sample:
        """The text of a conversation that waits for an answer, ending in the generation prompt. RowRefused where there
        is none."""
        return _encodable([self._prompt(conversation)])[0]

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
            return [self._prompt(record.prompt)]
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
        if self._config.split_special_tokens:
            found = SpecialTokenGuard(self._tokenizer, "").anywhere.finditer(record.text)
            spelled = tuple(match.span() for match in found)
        return [Sample(record.text, ((0, len(record.text)),), spelled)]

    def _conversation(self, conversation: Conversation) -> list[Sample]:
        answers = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not answers:
            raise RowRefused("no answer: the conversation has no turn of the assistant")
        considered = answers[-1:] if self._config.mask_history else answers
        learned = [place for place in considered if _to_learn(conversation.messages[place])]
        if not learned:
            empty = not any(_has_content(conversation.messages[place]) for place in considered)
            raise RowRefused("the answer is empty" if empty else "none of its answers is to be learned (weight 0)")
        return self._samples(conversation, learned, prompt_too=self._config.train_on_prompt)

    def _answer(self, conversation: Conversation) -> Sample:
        """The last turn alone is learned, as preference objectives compare it."""
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise RowRefused("no answer: the last turn is not the assistant's")
        if not _has_content(conversation.messages[-1]):
            raise RowRefused("the answer is empty")
        return self._samples(conversation, [len(conversation.messages) - 1], prompt_too=False)[0]

    def _samples(self, conversation: Conversation, learned: Sequence[int], prompt_too: bool) -> list[Sample]:
        template, shape = self._template()
        added = self._as_read(conversation)
        shift = len(added.messages) - len(conversation.messages)
        samples = samples_of(template, shape, added, [place + shift for place in learned], prompt_too=prompt_too)
        return [put_in(each, media_in(added, each.num_messages), processor_of(self._tokenizer)) for each in samples]

    def _prompt(self, conversation: Conversation) -> Sample:
        template, shape = self._template()
        conversation = self._as_read(conversation)
        requested = template.render(conversation.messages, conversation.tools, generation_prompt=True)
        sample = Sample(requested.text + shape.header, (), requested.spelled)
        return put_in(sample, media_in(conversation), processor_of(self._tokenizer))

    def _as_read(self, conversation: Conversation) -> Conversation:
        """With the settings' system prompt, thoughts where this template can write them, and ids if it needs some."""
        _refuse_deep(conversation)
        conversation, shape = self._with_system(conversation), self._template()[1]
        messages = with_call_ids(conversation.messages, shape.call_ids)
        if shape.ignores_thoughts:
            messages = tuple(map(_thinking_aloud, messages))
        return replace(conversation, messages=messages)

    def _with_system(self, conversation: Conversation) -> Conversation:
        system = self._config.default_system
        if system is None or any(message.role == "system" for message in conversation.messages):
            return conversation
        return replace(conversation, messages=(Message("system", system), *conversation.messages))


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
