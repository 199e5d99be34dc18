"""Which token comes next: transformers' own processors are the oracle, and every draw is the request's own."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowrank.adapters.bank import Bank
from lowrank.generate.detokenizer import IncrementalDetokenizer
from lowrank.generate.generator import Generator
from lowrank.generate.request import Answer, GenerationConfig, Prompt, RequestError
from lowrank.generate.sampling import choose
from lowrank.generate.sequence import GenerationSequence
from lowrank.models.base import Base
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import TINY, load

PROMPT = [5, 9, 9, 30]


def row(config: GenerationConfig, answered: list[int] | None = None) -> GenerationSequence:
    prompt = Prompt(np.array(PROMPT))
    made = GenerationSequence(
        prompt, config, stop_tokens=frozenset(), max_new_tokens=99, tokenizer=None, constraint=None
    )
    made.tokens += answered or []
    return made


def logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))


def drawn(config: GenerationConfig, times: int = 600) -> collections.Counter[Any]:
    rows = [row(config.model_copy(update={"seed": seed})) for seed in range(times)]
    return collections.Counter(choice.token for choice in choose(logits().repeat(times, 1), rows))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.8},
    ],
)
def test_draws_follow_transformers_probabilities(settings: dict[str, float]) -> None:
    config = GenerationConfig(**settings)
    scores = logits()[None]
    tokens = torch.tensor([PROMPT])
    if config.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(tokens, scores)
    scores = TemperatureLogitsWarper(config.temperature)(tokens, scores)
    if config.top_k:
        scores = TopKLogitsWarper(config.top_k)(tokens, scores)
    if config.top_p < 1:
        scores = TopPLogitsWarper(config.top_p)(tokens, scores)
    if config.min_p:
        scores = MinPLogitsWarper(config.min_p)(tokens, scores)
    expected = torch.softmax(scores[0], -1)
    counts = drawn(config)
    assert all(expected[token] > 0 for token in counts)
    shares = torch.tensor([counts[token] for token in range(40)]) / counts.total()
    assert (shares - expected).abs().max() < 0.07
    assert set(expected.topk(3).indices.tolist()) <= set(counts) or int((expected > 0).sum()) < 3


def test_rows_of_one_step_get_what_each_gets_alone() -> None:
    """Drawn together where their settings are alike, to the bit; log-probabilities and rows without a token too."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_k": 50, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 0.2, "logprobs": 3},
        {"logprobs": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    ]
    rows = [row(GenerationConfig(**settings[index % len(settings)], seed=index), [index, 7]) for index in range(40)]
    logits_BV = torch.stack([logits(seed) for seed in range(40)])
    logits_BV[3, 8], logits_BV[13] = float("nan"), float("-inf")
    together = choose(logits_BV.clone(), rows)
    assert together == [choose(logits_BV[index : index + 1].clone(), [each])[0] for index, each in enumerate(rows)]
    assert [choice.token for choice in together].count(None) == 2
    assert len(together[5].top) == 3
    assert together[6].top == ()
    assert together[6].logprob is not None


def test_a_draw_depends_on_its_own_request_only() -> None:
    config = GenerationConfig(temperature=1.0, top_p=0.9, seed=7)
    (one,) = choose(logits()[None], [row(config)])
    others = [row(GenerationConfig(temperature=1.0, seed=index)) for index in range(5)]
    assert choose(torch.stack([*[logits(i) for i in range(5)], logits()]), [*others, row(config)])[5] == one
    later = [choose(logits()[None], [row(config, list(range(n)))])[0].token for n in range(1, 30)]
    assert len(set(later)) > 1, "another place draws another number"


def test_penalties_and_biases() -> None:
    plain = logits()
    (token,) = (choice.token for choice in choose(plain.clone()[None], [row(GenerationConfig())]))
    assert token == int(plain.argmax())
    second = int(plain.topk(2).indices[1])
    gap = float(plain[token] - plain[second])
    assert token is not None
    for config, times, expected in [
        (GenerationConfig(logit_bias={second: gap + 0.1}), 0, second),
        (GenerationConfig(presence_penalty=min(2.0, gap + 0.1)), 0, token),
        (GenerationConfig(presence_penalty=min(2.0, gap + 0.1)), 1, second),
        (GenerationConfig(frequency_penalty=gap * 0.6), 1, token),
        (GenerationConfig(frequency_penalty=gap * 0.6), 2, second),
    ]:
        (choice,) = choose(plain.clone()[None], [row(config, [token] * times)])
        assert choice.token == expected
    assert gap < 1.9, "the cases above need another seed"


@pytest.fixture(scope="module")
def tiny() -> Base:
    return load(ModelConfig(path=TINY, dtype="float32", device="cpu"))


def generate(base: Base, text: str, config: GenerationConfig, stop_tokens: frozenset[int] = frozenset()) -> Answer:
    generator = Generator(base, Bank(base))
    token_L = np.array(base.tokenizer(text)["input_ids"])
    return generator.submit(Prompt(token_L), config, stop_tokens=stop_tokens).result()


def test_logprobs_are_the_models_own(tiny: Base) -> None:
    answer = generate(
        tiny, "The capital of", GenerationConfig(max_new_tokens=6, temperature=1.0, seed=1, top_k=5, logprobs=3)
    )
    question = tiny.tokenizer("The capital of")["input_ids"]
    with torch.no_grad(), tiny.using_attention(tiny.own_attention):
        logits_LV = tiny.model(input_ids=torch.tensor([question + answer.tokens])).logits[0]
    expected_LV = torch.log_softmax(logits_LV[len(question) - 1 : -1], -1)
    for place, token in enumerate(answer.tokens):
        assert answer.logprobs[place] == pytest.approx(float(expected_LV[place, token]), abs=1e-4)
        assert [token for token, _ in answer.top[place]] == expected_LV[place].topk(3).indices.tolist()


def test_stop_texts_and_stop_tokens(tiny: Base) -> None:
    whole = generate(tiny, "Once upon a time", GenerationConfig(max_new_tokens=30))
    assert (whole.finish, len(whole.tokens)) == ("length", 30)
    assert whole.text == tiny.tokenizer.decode(whole.tokens, skip_special_tokens=True)
    stop = whole.text[12:17]
    stopped = generate(tiny, "Once upon a time", GenerationConfig(max_new_tokens=30, stop=(stop, "never said")))
    assert (stopped.finish, stopped.text) == ("stop", whole.text[: whole.text.index(stop)])
    token = whole.tokens[4]
    cut = generate(tiny, "Once upon a time", GenerationConfig(max_new_tokens=30), frozenset({token}))
    assert (cut.finish, cut.tokens) == ("stop", whole.tokens[: whole.tokens.index(token)])


def test_text_comes_piece_by_piece_and_is_never_taken_back(tiny: Base) -> None:
    text = "naïve 你好，世界 🙂 done </s> <STOP and more"
    tokens = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = IncrementalDetokenizer(tiny.tokenizer, ("<STOP>", "never"))
    pieces = [stream.add(token) for token in tokens]
    pieces.append(stream.end())
    assert "".join(pieces) == tiny.tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 5
    stream = IncrementalDetokenizer(tiny.tokenizer, ("世界", "done"))
    shown = ""
    for token in tokens:
        shown += stream.add(token)
        if stream.stopped_by:
            break
    assert (shown + stream.end(), stream.stopped_by) == (text[: text.index("世界")], "世界")


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_json_of_a_schema(tiny: Base, temperature: float) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["Ada", "北京"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "good": {"type": "boolean"},
        },
        "required": ["name", "age", "good"],
        "additionalProperties": False,
    }
    config = GenerationConfig(max_new_tokens=120, temperature=temperature, seed=3, json_schema=schema)
    answer = generate(tiny, "Somebody:", config, frozenset({tiny.tokenizer.eos_token_id}))
    described = json.loads(answer.text)
    assert described.keys() == {"name", "age", "good"}
    assert described["name"] in ("Ada", "北京")
    assert 0 <= described["age"] <= 99
    assert answer.finish == "stop"
    with pytest.raises(RequestError, match="json_schema"):
        generate(tiny, "x", GenerationConfig(json_schema={"type": "no such type"}))
