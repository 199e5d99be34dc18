"""argv: base URL, key. OpenAI's Agents SDK by its defaults (the Responses API): a forced tool, an output type."""

import asyncio
import sys
from typing import Literal

import openai
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from pydantic import BaseModel, Field

set_tracing_disabled(True)
set_default_openai_client(openai.AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2]), use_for_tracing=False)
questions = []


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


@function_tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    questions.append(city)
    return "rain"


async def main() -> None:
    shaped = Agent(name="shaped", model="base", output_type=Weather)
    assert isinstance((await Runner.run(shaped, "The weather?")).final_output, Weather)
    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False)
    able = Agent(
        name="able", model="base", tools=[weather], model_settings=settings, tool_use_behavior="stop_on_first_tool"
    )
    await Runner.run(able, "The weather?", max_turns=4)
    assert questions[0] in ("Oslo", "Rome")
    streamed = Runner.run_streamed(Agent(name="plain", model="base"), "Hi")
    kinds = [event.type async for event in streamed.stream_events()]
    assert "raw_response_event" in kinds


asyncio.run(main())
