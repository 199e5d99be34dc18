"""argv: base URL, key. instructor by its default mode (a named tool), and by JSON schemas."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


plain = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2])
messages = [{"role": "user", "content": "The weather?"}]
for options in ({}, {"mode": instructor.Mode.JSON_SCHEMA}, {"mode": instructor.Mode.TOOLS_STRICT}):
    client = instructor.from_openai(plain, **options)
    found = client.chat.completions.create(model="base", messages=messages, response_model=Weather, max_retries=0)
    assert isinstance(found, Weather)
