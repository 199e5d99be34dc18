"""Every built-in chat template carries tools, calls and results, and is what it was without them."""

from __future__ import annotations

import pytest

from lowrank.data import templates
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.records import Conversation, Message
from tests.data.made_tokenizers import tokenizer_with

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("name", templates.names())
@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)])
def test_rows_with_tools_are_learned(name: str, system: tuple[Message, ...]) -> None:
    tokens = [each for each in templates.required_tokens(templates.source_of(name)) if each not in ("<s>", "</s>")]
    renderer = Renderer(tokenizer_with(tokens, ""), DataConfig(chat_template=name))
    turns = (
        *system,
        Message("user", "Weather in Oslo and Rome?"),
        Message("assistant", "", (CALL, CALL)),
        Message("tool", "rain"),
        Message("tool", "sun"),
        Message("assistant", "It rains; it shines."),
    )
    rendering = renderer.render(Conversation(turns, (TOOL,)))
    assert rendering.problem is None
    text = "".join(renderer.tokenizer.decode(segment.token_L) for segment in rendering.segments)
    described = "".join(part for each in rendering.segments for part, weight in renderer.show(each) if weight)
    assert '"weather"' in text
    assert "Tells it." in text
    assert "rain" in text
    assert "sun" in text
    assert described.count('"Oslo"') == 2
    assert "It rains; it shines." in described
    assert "sun" not in described
