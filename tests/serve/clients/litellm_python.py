"""argv: base URL, key. LiteLLM as people call it: chat with a forced tool, responses, a stream."""

import json
import sys

import litellm

to = {"api_base": f"{sys.argv[1]}/v1", "api_key": sys.argv[2], "model": "openai/base"}
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
messages = [{"role": "user", "content": "The weather in Oslo?"}]
reply = litellm.completion(messages=messages, tools=[tool], tool_choice="required", **to)
assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")
chunks = list(litellm.completion(messages=messages, max_tokens=6, stream=True, **to))
assert any(chunk.choices[0].finish_reason for chunk in chunks)
answer = litellm.responses(input="Name a color.", max_output_tokens=8, **to)
assert answer.output
