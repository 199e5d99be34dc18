"""argv: base URL, key. pydantic-ai by its defaults: an output type (a forced tool), and a tool of its own."""

import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2])
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    agent = Agent(kind("base", provider=provider), output_type=Weather)
    assert isinstance(agent.run_sync("The weather?").output, Weather)
    plain = Agent(kind("base", provider=provider), model_settings={"max_tokens": 8})
    assert isinstance(plain.run_sync("Name a color.").output, str)
