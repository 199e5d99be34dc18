"""The text of an answer for people, with the model's reasoning where its chat template has a form for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.thoughts import thoughts_of
from lowrank.generate.detokenizer import decode, hidden_tokens
from lowrank.generate.request import Answer, TokenChunk


class AnswerText:
    """Turns the chunks of one answer into its text. Tags of reasoning stay as they are, channels become `<think>` tags.

    marks   control tokens that the chunks' text has to show (`preserved_tokens`)
    """

    def __init__(self, renderer: Renderer) -> None:
        thinking = thoughts_of(renderer.chat_template, renderer.config.chat_template_kwargs)
        self.marks: tuple[str, ...] = () if thinking is None else thinking.marks
        aloud = None if thinking is None else thinking.left_in()
        self._reader = None if aloud is None else aloud.reader()
        self._text = ""

    def add(self, chunk: TokenChunk) -> str:
        """The text that is sure now."""
        if self._reader is None:
            return chunk.text
        text = self._reader.add(chunk.text)[1]
        if chunk.finish is not None:
            text += self._reader.end()[1]
        self._text += text
        return text

    def of(self, answer: Answer) -> Answer:
        """The answer whose chunks these were, with their text."""
        return answer if self._reader is None else replace(answer, text=self._text)


def answer_text_of(renderer: Renderer, tokens: Sequence[int]) -> str:
    """The text of a whole answer, from its tokens."""
    text = AnswerText(renderer)
    hidden = hidden_tokens(renderer.tokenizer, text.marks) if text.marks else None
    return text.add(TokenChunk(None, decode(renderer.tokenizer, tokens, hidden), finish="stop"))
