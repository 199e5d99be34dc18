"""A server that runs for long: nothing of an answer stays behind, and new requests bring no new shapes."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lowrank.generate.request import TokenChunk
from lowrank.generate.sequence import GenerationSequence
from lowrank.generate.token_stream import TokenStream
from lowrank.kernels.shape_bucketing import bucketed_rows
from lowrank.serve.api.request_lifecycle import RequestLifecycle
from tests.serve.running import Running, open_world, serving

KINDS = (GenerationSequence, TokenStream, TokenChunk, RequestLifecycle)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(open_world()) as running:
        yield running


def post(server: Running, number: int, **options: Any) -> None:
    """Whole, streamed, or streamed and left; questions of many lengths."""
    client = server.client()
    messages: Any = [{"role": "user", "content": "word " * (1 + number * 7 % 90)}]
    name = ("base", "one", "two")[number % 3]
    requested: dict[str, Any] = {"model": name, "messages": messages, "max_tokens": 3 + number % 5, "seed": number}
    if number % 3 == 0:
        client.chat.completions.create(**requested)
        return
    with client.chat.completions.create(**requested, stream=True) as stream:
        for _ in stream:
            if number % 3 == 2:
                break


def test_no_answer_waits_for_the_collector_of_cycles(server: Running) -> None:
    """What only the collector frees piles up beside a model's many objects, where it comes rarely."""
    post(server, 1)
    assert server.settles()
    gc.collect()
    gc.disable()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: post(server, number), range(24)))
        assert server.settles()
        for _ in range(100):  # the engine's thread may still be on its way out of its last step; a cycle never goes
            kept = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)
            if not kept:
                break
            time.sleep(0.02)
    finally:
        gc.enable()
    assert sum(kept.values()) == 0, kept


def test_layers_see_few_numbers_of_rows(server: Running) -> None:
    """oneDNN makes code for every number of rows and keeps it: 955 MB became 1,193 MB within six loads."""
    seen: Counter[int] = Counter()
    layer = server.trained.base.model.get_submodule("model.layers.0.mlp.down_proj")
    hook = layer.base.register_forward_pre_hook(lambda _, given: seen.update([given[0].shape[0]]))
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: post(server, number), range(48)))
        assert server.settles()
    finally:
        hook.remove()
    assert sum(seen.values()) > 20
    assert all(bucketed_rows(rows) == rows for rows in seen), seen
