"""Whatever a chat template does, an answer is learned once and whole or its row is refused; nothing else is learned.

Random conversations, with system prompts, thinking, tool calls and tool results, through every chat template that TRL
knows: as the model's makers wrote it, and as TRL patched it for training.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import trl

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_with, trl_template

NAMES = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKENS = re.compile(
    r"<[^<>\s'\"]*[|｜][^<>\s'\"]*>|<(?:start|end)_of_turn>|</?think>|\[gMASK\]|<sop>|<bos>"  # as the makers' have
)
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"k": {"type": "string", "description": "-"}}, "required": []},
    },
}


class Conversations:
    """Made-up conversations in which `say` words are an assistant's and `ctx` words are not."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.tools = seed % 2 == 1
        self.count = 0

    def unique_text(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}q"

    def answer(self, thinks: bool, call: bool) -> Message:
        thought = f"<think>\n{self.unique_text('say')}\n</think>\n\n" if thinks else ""
        if not call:
            return Message("assistant", thought + self.unique_text("say"))
        described = self.unique_text("say") if self.draw.random() < 0.3 else ""
        function = {"name": "lookup", "arguments": {"k": self.unique_text("say")}}
        return Message(
            "assistant", thought + described, ({"type": "function", "id": "abcdefghi", "function": function},)
        )

    def conversation(self) -> Conversation:
        messages = [Message("system", self.unique_text("ctx"))] if self.draw.random() < 0.4 else []
        for _ in range(self.draw.randint(1, 3)):
            messages.append(Message("user", self.unique_text("ctx")))
            thinks = self.draw.random() < 0.4
            for _ in range(self.draw.randint(0, 2) if self.tools else 0):
                messages += [self.answer(thinks, call=True), Message("tool", self.unique_text("ctx"))]
            messages.append(self.answer(thinks, call=False))
        return Conversation(tuple(messages), (TOOL,) if self.tools else ())


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_learned_once_and_whole_or_refused(name: str) -> None:
    template = trl_template(name)
    tokens = sorted(set(TOKENS.findall(template)))
    ends = re.compile(f"({'|'.join(map(re.escape, [*tokens, '</s>']))})$")
    renderer = Renderer(tokenizer_with(tokens, template), DataConfig(max_length=10**6))
    rendered = 0
    for seed in range(30):
        conversation = Conversations(seed).conversation()
        rendering = renderer.render(conversation)
        assert bool(rendering.problem) is not bool(rendering.segments)
        if rendering.problem:
            continue
        rendered += 1
        pieces = [text for segment in rendering.segments for text, weight in renderer.show(segment) if weight]
        described = " ".join(pieces)
        written = " ".join(message.content + str(message.tool_calls) for message in conversation.messages)
        assert "ctx" not in described
        assert sorted(re.findall(r"say\d+q", described)) == sorted(re.findall(r"say\d+q", written))
        for piece in pieces:  # the last thing learned of an answer is a token that ends a turn
            assert ends.search(piece.rstrip()), piece
    assert rendered >= 3
