"""argv: base URL, key. OpenAI's own client: tools that must be called, structured output, responses, streams."""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0)


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


question = [{"role": "user", "content": "The weather in Oslo?"}]
tool = openai.pydantic_function_tool(Weather, name="weather")
for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    made = client.chat.completions.parse(model="base", messages=question, tools=[tool], tool_choice=choice)
    call = made.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather), call
follow = [*question, made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
assert client.chat.completions.create(model="base", messages=follow, tools=[tool], max_tokens=4).choices
parsed = client.chat.completions.parse(model="base", messages=question, response_format=Weather)
assert parsed.choices[0].message.parsed.city in ("Oslo", "Rome")
options = {"reasoning_effort": "low", "service_tier": "auto", "store": True, "verbosity": "low", "user": "me"}
raw = client.chat.completions.with_raw_response.create(
    model="base", messages=question, max_tokens=2, modalities=["text"], metadata={"a": "b"}, **options
)
assert "verbosity" in raw.headers["x-lowrank-warning"], raw.headers

text = client.responses.create(model="base", input="Name a color.", max_output_tokens=8)
assert text.output[0].type == "message"
assert text.usage.output_tokens <= 8
assert text.status in ("completed", "incomplete")
shaped = client.responses.parse(model="base", input="The weather?", instructions="Be brief.", text_format=Weather)
assert shaped.output_parsed.days in range(1, 10)
flat = {"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}
called = client.responses.create(model="base", input=question, tools=[flat], tool_choice="required")
assert json.loads(called.output[0].arguments)["city"] in ("Oslo", "Rome")
result = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "rain"}
more = client.responses.create(model="base", input=[*question, *called.output, result], max_output_tokens=4)
assert more.output
with client.responses.stream(model="base", input="Name a color.", max_output_tokens=8) as stream:
    events = list(stream)
    kinds = [event.type for event in events]
    # Of an answer that the limit of tokens cut off, as OpenAI tells of it, the client has no final response.
    final = stream.get_final_response() if kinds[-1] == "response.completed" else events[-1].response
assert kinds[0] == "response.created"
assert kinds[-1] in ("response.completed", "response.incomplete")
assert final.output_text == "".join(part.text for item in final.output for part in item.content)
