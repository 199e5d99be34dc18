"""`/v1/embeddings` by OpenAI's client: the pooled hidden states of transformers' model with PEFT's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers
from peft import PeftModel

import lowrank.models.tiny as shipped
from tests.serve.running import Running, open_world, save, serving

TEXTS = ["The sea is wide.", "a", "Many birds live near the river, and some of them sing."]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(open_world()) as running:
        yield running


@pytest.mark.parametrize("name", ["base", "one"])
def test_vectors_are_those_of_transformers_and_peft(server: Running, name: str, tmp_path: Path) -> None:
    folder = Path(shipped.__path__[0])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name != "base":
        world = open_world()
        save(world, world.slots[name], tmp_path / name)
        model = PeftModel.from_pretrained(model, tmp_path / name).merge_and_unload()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    client = server.client()
    reply = client.embeddings.create(model=name, input=TEXTS)  # the client asks for base64
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert reply.usage.prompt_tokens == sum(map(len, tokens))
    last = client.embeddings.create(model=name, input=tokens, encoding_format="float", extra_body={"pooling": "last"})
    for index, each in enumerate(tokens):
        with torch.no_grad():
            hidden_TD = model.model(input_ids=torch.tensor([each])).last_hidden_state[0]
        for given, pooled_D in ((reply, hidden_TD.mean(0)), (last, hidden_TD[-1])):
            assert given.data[index].index == index
            expected_D = torch.nn.functional.normalize(pooled_D, dim=0).numpy()
            np.testing.assert_allclose(given.data[index].embedding, expected_D, atol=2e-6)


def test_a_text_is_read_the_same_while_others_are_answered(server: Running) -> None:
    client = server.client()
    alone = client.embeddings.create(model="two", input=TEXTS[0]).data[0].embedding
    stream = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "Talk."}], max_tokens=60, stream=True, temperature=0
    )
    beside = client.embeddings.create(model="two", input=TEXTS[0]).data[0].embedding
    assert beside == alone
    described = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    again = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "Talk."}], max_tokens=60, temperature=0
    )
    assert described == again.choices[0].message.content
    assert server.settles()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "three"}, 404, "base, one, two"),
        ({"input": []}, 400, "input: there is none"),
        ({"input": ""}, 400, "the text has no tokens"),
        ({"input": "word " * 3000}, 400, r"has \d+ tokens and the model's maximum context length is 1024"),
        ({"input": [1, 99999]}, 400, "there is no 99999"),
        ({"input": ["a"] * 3000}, 400, "3000 texts in one request"),
        ({"dimensions": 9999}, 400, "dimensions: the model's vectors have 192, 9999 are asked for"),
        ({"extra_body": {"pooling": "max"}}, 400, "pooling"),
    ],
)
def test_what_cannot_be_read_says_why(server: Running, options: dict[str, Any], status: int, message: str) -> None:
    given: Any = {"model": "base", "input": "x", **options}
    with pytest.raises(openai.APIStatusError, match=f"(?s){message}") as caught:
        server.client().embeddings.create(**given)
    assert caught.value.status_code == status
    assert server.service.limiter.taken == 0
