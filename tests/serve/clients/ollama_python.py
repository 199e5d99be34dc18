"""argv: base URL, key. Ollama's client: chat, streams, a schema, tools in the prompt, generate, list, show."""

import sys
from typing import Literal

import ollama
from pydantic import BaseModel


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]


client = ollama.Client(sys.argv[1], headers={"Authorization": f"Bearer {sys.argv[2]}"})
messages = [{"role": "user", "content": "The weather?"}]
few = {"num_predict": 6, "temperature": 0, "num_ctx": 512}
assert client.list().models[0].model == "base"
assert client.show("base").capabilities
whole = client.chat("base", messages, options=few, keep_alive="5m")
assert whole.done
assert whole.eval_count <= 6
streamed = list(client.chat("base:latest", messages, options=few, stream=True))
assert "".join(part.message.content for part in streamed) == whole.message.content
assert streamed[-1].done_reason in ("stop", "length")
held = client.chat("base", messages, format=Weather.model_json_schema(), options={"num_predict": 60, "temperature": 0})
assert Weather.model_validate_json(held.message.content)
assert client.generate("base", "Name a color.", options=few).response is not None
assert list(client.generate("base", "Name a color.", options=few, stream=True, raw=True))
try:
    client.chat("nobody", messages)
except ollama.ResponseError as error:
    refused = error
else:
    raise AssertionError("there is no such model")
assert refused.status_code == 404
assert "there are base" in refused.error
