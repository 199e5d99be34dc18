"""The engine for vLLM without a GPU: its words, and its bookkeeping around an engine with AsyncLLM's signatures.

vLLM itself needs a GPU and another torch, so what answers here is a stand-in that is honest about one thing only: what
AsyncLLM of vLLM 0.32.0 is called with, and what it yields. Where vLLM is installed its own classes are used.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ModelError
from lowrank.generate.request import GenerationConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engines.vllm import Vllm, VllmEngine, open_vllm
from lowrank.serve.vllm_engine.params import rank_for, sampling_options, token_chunks
from tests.serve.running import TOKEN, http_serving, open_world, save


@dataclass
class Output:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def test_words_of_a_request() -> None:
    config = GenerationConfig(
        temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=7, stop=("x",), logprobs=2, logit_bias={3: -100.0}
    )
    options = sampling_options(config, frozenset({9, 2}), 12)
    assert options == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 7, "logprobs": 2, "max_tokens": 12, "stop": ["x"],
        "stop_token_ids": [2, 9], "logit_bias": {3: -100.0},
    }  # fmt: skip
    assert {key: sampling_options(GenerationConfig(top_p=0), frozenset(), 1)[key] for key in ("top_p", "top_k")} == {
        "top_p": 1.0,
        "top_k": 1,
    }
    assert sampling_options(GenerationConfig(seed=-1), frozenset(), 1)["seed"] == (1 << 63) - 1
    try:
        from vllm import SamplingParams
    except ImportError:
        return
    SamplingParams(**options)


def test_outputs_as_pieces() -> None:
    likely = [{5: SimpleNamespace(logprob=-0.1), 6: SimpleNamespace(logprob=-2.0)}]
    (piece,) = token_chunks(Output("Hi", [5], likely), 1)
    assert (piece.token, piece.text, piece.logprob, piece.top, piece.finish) == (5, "Hi", -0.1, ((5, -0.1),), None)
    several = token_chunks(Output(" you two", [7, 8]), 0)
    assert [(piece.token, piece.text) for piece in several] == [(7, ""), (8, " you two")]
    ended = token_chunks(Output("!", [9, 2], finish_reason="stop"), 0)
    assert [(piece.token, piece.text, piece.finish) for piece in ended] == [(9, "", None), (None, "!", "stop")]
    by_text = token_chunks(Output("", [9], finish_reason="stop", stop_reason="x"), 0)
    assert [(piece.token, piece.finish) for piece in by_text] == [(9, None), (None, "stop")]
    by_length = token_chunks(Output("a", [9], finish_reason="length"), 0)
    assert [(piece.token, piece.finish) for piece in by_length] == [(9, None), (None, "length")]
    assert [piece.finish for piece in token_chunks(Output("", [], finish_reason="abort"), 0)] == ["cancelled"]
    (failed,) = token_chunks(Output("", [], finish_reason="repetition"), 0)
    assert (failed.finish, failed.error) == ("error", "vLLM ended the answer: repetition")
    assert token_chunks(Output("", []), 0) == []


def test_ranks_are_those_vllm_takes() -> None:
    assert [rank_for(ranks) for ranks in ([], [4], [8, 17], [64], [300])] == [16, 16, 32, 64, 320]


@dataclass
class Llm:
    """Says the letters of the adapter it was asked with, over and over, one a token."""

    tokenizer: Any
    loaded: dict[int, Any] = field(default_factory=dict)
    aborted: int = 0
    seconds_per_token: float = 0.002
    errored: bool = False
    model_config: Any = field(default_factory=lambda: SimpleNamespace(max_model_len=256, get_vocab_size=lambda: 3072))

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        assert isinstance(prompt["prompt_token_ids"][0], int)
        assert lora_request is None or lora_request.lora_int_id in self.loaded, "it was unloaded in mid-answer"
        name = "base" if lora_request is None else self.loaded[lora_request.lora_int_id].text
        try:
            for place in range(sampling_params.max_tokens):
                letter = name[place % len(name)]
                (token,) = self.tokenizer(letter, add_special_tokens=False)["input_ids"]
                last = place == sampling_params.max_tokens - 1
                chances = None if sampling_params.logprobs is None else [{token: SimpleNamespace(logprob=-0.5)}]
                output = Output(letter, [token], chances, "length" if last else None)
                yield SimpleNamespace(outputs=[output], num_cached_tokens=None, finished=last)
                await asyncio.sleep(self.seconds_per_token)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    async def add_lora(self, request: Any) -> bool:
        path = Path(request.lora_path)
        if not (path / "adapter_config.json").is_file() or (path / "broken").exists():
            raise ValueError("no adapter")
        request.text = (path / "says").read_text("utf-8")
        self.loaded[request.lora_int_id] = request
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.loaded.pop(number, None) is not None

    def shutdown(self) -> None:
        self.errored = True


@dataclass
class World:
    llm: Llm
    engine: VllmEngine
    client: openai.OpenAI
    folder: Path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    tiny = open_world()
    for name in ("one", "two"):
        save(tiny, tiny.slots[name], tmp_path / name)
        (tmp_path / name / "says").write_text(name, "utf-8")
    tokenizer = load_tokenizer(ModelConfig(path="lowrank/tiny"))
    llm = Llm(tokenizer)
    vllm = Vllm(
        llm=llm,
        sampling=SimpleNamespace,
        form=lambda config: config,
        lora=lambda name, number, path: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path),
    )
    renderers = {"base": Renderer(tokenizer, DataConfig())}
    engine = VllmEngine(vllm, tokenizer, renderers, {"one": tmp_path / "one"}, roots=[tmp_path])
    with http_serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield World(llm, engine, client, tmp_path)
    assert not engine.alive


def complete(world: World, name: str, tokens: int = 6, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "x"}]
    return world.client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, **options)


def test_answers_streams_and_probabilities(world: World) -> None:
    assert [model.id for model in world.client.models.list()] == ["base", "one"]
    whole = complete(world, "one", n=2, logprobs=True)
    assert [choice.message.content for choice in whole.choices] == ["oneone"] * 2
    assert whole.choices[0].finish_reason == "length"
    assert [token.logprob for token in whole.choices[0].logprobs.content] == [-0.5] * 6
    assert whole.usage.completion_tokens == 12
    assert "".join(chunk.choices[0].delta.content or "" for chunk in complete(world, "base", stream=True)) == "baseba"
    assert world.client.completions.create(model="base", prompt="x", max_tokens=4).choices[0].text == "base"


def test_a_new_version_answers_new_questions_and_the_old_one_ends_its_own(world: World) -> None:
    stream = iter(complete(world, "one", 60, stream=True))
    next(stream)
    (world.folder / "one" / "says").write_text("new", "utf-8")
    first = next(iter(world.llm.loaded.values()))
    served = world.engine.publish("one", "one")
    assert served.version == 2
    assert complete(world, "one").choices[0].message.content == "newnew"
    names = [request.lora_name for request in world.llm.loaded.values()]
    assert len(set(names)) == 2, "keys are known by name, so each version has one of its own"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert set(text) == set("one"), "it ends as it began"
    settle(lambda: first.lora_int_id not in world.llm.loaded)
    assert not Path(first.lora_path).exists()
    world.engine.unpublish("one")
    settle(lambda: not world.llm.loaded)
    with pytest.raises(openai.NotFoundError, match="there are base"):
        complete(world, "one")


def test_who_leaves_is_aborted(world: World) -> None:
    world.llm.seconds_per_token = 0.1  # so that none is over before it is left
    streams = [complete(world, name, 200, stream=True) for name in ("base", "one", "one")]
    for stream in streams:
        next(iter(stream))
    assert world.engine.load().running == 3
    for stream in streams:
        stream.close()
    settle(lambda: world.engine.load().running == 0)
    assert world.llm.aborted == 3


def test_what_cannot_be_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens and the model's maximum context length is 256"):
        world.client.completions.create(model="base", prompt="word " * 600)
    with pytest.raises(openai.BadRequestError, match="no embeddings with --engine vllm"):
        world.client.embeddings.create(model="base", input="x")
    (world.folder / "two" / "broken").write_text("", "utf-8")
    with pytest.raises(ApiError, match="vLLM cannot load"):
        world.engine.publish("two", "two")
    with pytest.raises(ApiError, match="outside the folders"):
        world.engine.publish("two", "../elsewhere")
    assert [served.name for served in world.engine.served_models()] == ["base", "one"]

    async def fail(*_: Any, **__: Any) -> AsyncIterator[Any]:
        raise RuntimeError("the engine is dead")
        yield

    monkeypatch.setattr(world.llm, "generate", fail)
    with pytest.raises(openai.InternalServerError, match="the engine is dead"):
        complete(world, "one")
    assert world.engine.load().running == 0


def test_one_adapter_that_vllm_cannot_load_stops_no_other(world: World, tmp_path: Path) -> None:
    (world.folder / "two" / "broken").write_text("", "utf-8")
    described: list[str] = []
    folders = {name: world.folder / name for name in ("one", "two")}

    def engine(names: list[str]) -> VllmEngine:
        chosen = {name: folders[name] for name in names}
        renderers = world.engine._renderers
        llm = Llm(world.llm.tokenizer)
        vllm = replace(world.engine._vllm, llm=llm)
        return VllmEngine(vllm, llm.tokenizer, renderers, chosen, notify=described.append)

    served = engine(["one", "two"])
    assert [served.name for served in served.served_models()] == ["base", "one"]
    assert described[0].startswith("two is not served: vLLM cannot load")
    served.close()
    with pytest.raises(ApiError, match="vLLM cannot load"):
        engine(["two"])


def test_without_vllm_it_says_what_is_missing() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match=r"pip install 'lowrank-llm\[serve,vllm\]'"):
            open_vllm(ModelConfig(path="lowrank/tiny"), max_num_seqs=1, max_loras=1, max_rank=16)


def settle(done: Any) -> None:
    for _ in range(250):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it did not settle")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_nothing_of_vllm_outlives_a_killed_server(tmp_path: Path) -> None:
    arguments = ["serve", "lowrank/tiny", "--engine", "vllm", "--port", "0"]
    settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "lowrank", *arguments],
        env=settings,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        shown = ""
        while "http://" not in shown:
            line = server.stdout.readline()
            assert line, shown
            shown += line
        children = psutil.Process(server.pid).children(recursive=True)
        watches = [child for child in children if "child_watch" in " ".join(child.cmdline())]
        engine = [child for child in children if child not in watches]
        assert watches
        assert engine
        server.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([*engine, *watches], timeout=30)
        for each in alive:
            each.kill()
        assert not alive
