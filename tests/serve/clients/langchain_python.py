"""argv: base URL, key. LangChain's chat model: structured output by default and by tools, bound tools, a stream."""

import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return "rain"


for responses in (False, True):
    model = ChatOpenAI(
        base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], model="base", max_tokens=400, use_responses_api=responses
    )
    assert isinstance(model.with_structured_output(Weather).invoke("The weather?"), Weather)
    assert isinstance(model.with_structured_output(Weather, method="function_calling").invoke("The weather?"), Weather)
    reply = model.bind_tools([weather], tool_choice="any").invoke("The weather?")
    assert reply.tool_calls[0]["name"] == "weather"
    assert list(model.stream("Name a color."))
