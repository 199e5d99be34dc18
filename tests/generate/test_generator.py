"""Continuous batching: the right tokens for everybody, whoever else is there, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.generate.adapter_registry import AdapterRegistry
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import Answer, GenerationConfig, Prompt, RequestError
from lowrank.train.engine import Engine
from tests.tiny_models import make_base, make_engine, random_step

GREEDY = GenerationConfig(max_new_tokens=8)


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 97, length)


def world(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Engine, list[int]]:
    """Two adapters that say something else than the base."""
    engine, slots = make_engine(
        make_base(family, dtype, **changes), LoraConfig(rank=4, alpha=8), LoraConfig(rank=2, alpha=8)
    )
    for step in range(3):
        engine.forward_backward({slot: random_step(step + slot, [20, 9]) for slot in slots})
        for slot in slots:
            engine.optim_step(slot, 0.1)
    return engine, slots


def generator_of(engine: Engine, **settings: Any) -> Generator:
    return Generator(engine.base, engine.bank, GeneratorConfig(**settings))


def alone(engine: Engine, prompt: Prompt, config: GenerationConfig = GREEDY) -> Answer:
    return generator_of(engine).submit(prompt, config).result()


@pytest.fixture(scope="module")
def llama() -> tuple[Engine, list[int]]:
    return world()


def test_a_base_is_asked_once_whether_it_goes_on_from_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator comes with every evaluation, and the question reads every weight of the base seven times."""
    engine, _ = world()
    passes: list[None] = []
    call = engine.base.call
    monkeypatch.setattr(engine.base, "call", lambda *given, **options: passes.append(None) or call(*given, **options))
    generator_of(engine)
    first = len(passes)
    generator_of(engine)
    assert (first > 0, len(passes) - first) == (True, 0)
    engine.base.set_layout("padded")
    assert "does not receive the boundaries" in str(generator_of(engine).notice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_same_answer_whatever_else_is_in_the_batch(dtype: torch.dtype, temperature: float) -> None:
    engine, slots = world(dtype=dtype)
    config = GenerationConfig(max_new_tokens=12, temperature=temperature, top_p=0.95, seed=5)
    prompts = [Prompt(text(i, 3 + 5 * (i % 5)), (*slots, -1)[i % 3]) for i in range(9)]
    expected = [alone(engine, prompt, config).tokens for prompt in prompts]
    generator = generator_of(engine, max_num_batched_tokens=7, max_num_seqs=4)  # pieces of questions, and a queue
    generations = []
    for prompt in prompts:  # they come one by one while others are being answered
        generations.append(generator.submit(prompt, config))
        generator.step()
    assert [generation.result().tokens for generation in generations] == expected
    assert len({tuple(tokens) for tokens in expected}) > 3


def test_a_long_question_does_not_stop_an_answer(llama: tuple[Engine, list[int]]) -> None:
    generator = generator_of(llama[0], max_num_batched_tokens=8)
    answering = generator.submit(Prompt(text(0, 4)), GenerationConfig(max_new_tokens=20))
    generator.step()
    question = generator.submit(Prompt(text(1, 50)), GenerationConfig(max_new_tokens=2))
    for described in range(2, 9):
        generator.step()
        assert len(answering.answer.tokens) == described
        assert question.answer.tokens == []
    generator.step()
    assert len(question.answer.tokens) == 1


def test_a_common_beginning_is_read_once(llama: tuple[Engine, list[int]]) -> None:
    engine, (one, two) = llama
    generator = generator_of(engine)
    long = text(0, 40)
    first = generator.submit(Prompt(long, one), GREEDY).result()
    again = generator.submit(Prompt(long, one), GREEDY).result()
    longer = generator.submit(Prompt(np.concatenate([long, text(1, 5)]), one), GREEDY).result()
    other = generator.submit(Prompt(long, two), GREEDY).result()
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens, other.cached_tokens) == (0, 32, 32, 0)
    assert again.tokens == first.tokens
    assert longer.tokens == alone(engine, Prompt(np.concatenate([long, text(1, 5)]), one)).tokens
    assert other.tokens == alone(engine, Prompt(long, two)).tokens != first.tokens


def test_new_weights_never_meet_old_keys() -> None:
    """vLLM #42125: an adapter loaded anew under its old name read the cache of its old version."""
    engine, (one, two) = world()
    generator = generator_of(engine)
    prompt = Prompt(text(0, 40), one)
    before = generator.submit(prompt, GREEDY).result()
    on_its_way = generator.submit(prompt, GenerationConfig(max_new_tokens=12))
    generator.step()
    generator.step()
    with torch.no_grad():
        for parameter in engine.bank.parameters(one).values():
            parameter.mul_(-1.5)
    engine.bank.refresh(one)
    generator.changed(one)
    after = generator.submit(prompt, GREEDY).result()
    assert after.cached_tokens == 0
    assert after.tokens == alone(engine, prompt).tokens != before.tokens
    assert (
        on_its_way.result().tokens[2:]
        == alone(
            engine,
            Prompt(np.concatenate([prompt.token_L, before.tokens[:2]]), one),
            GenerationConfig(max_new_tokens=10),
        ).tokens
    )
    del two


def test_published_anew_while_it_answers() -> None:
    engine, (one, two) = world()
    bank = engine.bank
    generator = generator_of(engine)
    published = AdapterRegistry(generator, {"base": -1, "pet": one})
    old = alone(engine, Prompt(text(0, 40), one), GenerationConfig(max_new_tokens=10)).tokens
    new = alone(engine, Prompt(text(0, 40), two), GenerationConfig(max_new_tokens=10)).tokens
    tensors = {name: value.detach().clone() for name, value in bank.parameters(two).items()}
    running = published.submit("pet", text(0, 40), GenerationConfig(max_new_tokens=10))
    generator.step()
    published.publish("pet", bank.slots[two].config, tensors)
    fresh = published.submit("pet", text(0, 40), GenerationConfig(max_new_tokens=10))
    assert one in bank.slots
    assert (running.result().tokens, fresh.result().tokens) == (old, new)
    generator.step()
    assert one not in bank.slots, "the old version is gone with its last answer"
    published.publish("third", bank.slots[two].config, tensors)  # takes the number that is free
    third = published.submit("third", text(0, 40), GenerationConfig(max_new_tokens=10)).result()
    assert (third.tokens, third.cached_tokens) == (new, 0)
    with pytest.raises(RequestError, match="did you mean 'pet'"):
        published.submit("pett", text(0, 4), GREEDY)
    published.unpublish("pet")
    with pytest.raises(RequestError):
        published.unpublish("base")


def test_too_little_room_costs_time_only(llama: tuple[Engine, list[int]]) -> None:
    engine, slots = llama
    config = GenerationConfig(max_new_tokens=25, temperature=0.8, seed=1)
    prompts = [Prompt(text(i, 20), (*slots, -1)[i % 3]) for i in range(6)]
    expected = [alone(engine, prompt, config).tokens for prompt in prompts]
    generator = generator_of(engine, kv_cache_tokens=100)
    room = generator.free_tokens
    generations = [generator.submit(prompt, config) for prompt in prompts]
    assert [generation.result().tokens for generation in generations] == expected
    assert generator.free_tokens == room
    with pytest.raises(RequestError, match="room for 112"):
        generator_of(world(max_position_embeddings=512)[0], kv_cache_tokens=100).submit(
            Prompt(text(0, 100)), GenerationConfig(max_new_tokens=30)
        )


def test_what_nan_leaves_behind_hurts_nobody() -> None:
    engine, (one, two) = world()
    prompts = [Prompt(text(i, 17), two) for i in range(3)]
    expected = [alone(engine, prompt).tokens for prompt in prompts]
    with torch.no_grad():
        for parameter in engine.bank.parameters(one).values():
            parameter.fill_(float("nan"))
    generator = generator_of(engine, kv_cache_tokens=200)
    for _ in range(3):
        sick = [generator.submit(Prompt(text(9, 30), one), GREEDY) for _ in range(2)]
        well = [generator.submit(prompt, GREEDY) for prompt in prompts]
        assert [generation.result().tokens for generation in well] == expected
        assert [generation.result().finish for generation in sick] == ["error", "error"]
        assert "diverged" in (sick[0].answer.error or "")


def test_cancelled_ones_leave_their_room(llama: tuple[Engine, list[int]]) -> None:
    generator = generator_of(llama[0], max_num_seqs=1)
    room = generator.free_tokens
    running, waiting = (generator.submit(Prompt(text(i, 9)), GenerationConfig(max_new_tokens=40)) for i in range(2))
    generator.step()
    assert generator.free_tokens < room
    assert (generator.num_running, generator.num_waiting) == (1, 1)
    running.cancel()
    waiting.cancel()
    assert not generator.step()
    assert generator.free_tokens == room
    assert [each.result().finish for each in (running, waiting)] == ["cancelled", "cancelled"]
    assert len(running.answer.tokens) == 1
    running.cancel()  # too late, and no harm
    assert not generator.step()


@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_many_threads_and_async_listeners(family: str) -> None:
    engine, slots = world(family)
    prompts = [Prompt(text(i, 3 + i), (*slots, -1)[i % 3]) for i in range(8)]
    expected = [alone(engine, prompt).tokens for prompt in prompts]
    generator = generator_of(engine)
    assert (generator.notice is None) == (family == "llama")
    generator.start()
    found: dict[int, list[int]] = {}

    def submit(index: int) -> None:
        found[index] = generator.submit(prompts[index], GREEDY).result().tokens

    async def submit_async(index: int) -> None:
        chunks = [chunk async for chunk in generator.submit(prompts[index], GREEDY)]
        assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        found[index] = [chunk.token for chunk in chunks if chunk.token is not None]

    async def submit_all_async() -> None:
        await asyncio.gather(*(submit_async(index) for index in range(4, 8)))

    threads = [threading.Thread(target=submit, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(submit_all_async())
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(8)] == expected
    endless = generator.submit(prompts[0], GenerationConfig(max_new_tokens=40))
    assert generator.between_steps(lambda: threading.current_thread().name) == "lowrank-generator"
    generator.close()
    assert endless.answer.finish in ("cancelled", "length")
    assert not generator.threaded


def test_a_step_that_fails_ends_its_requests_and_nothing_else(
    llama: tuple[Engine, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = llama
    expected = alone(engine, Prompt(text(0, 20))).tokens
    generator = generator_of(engine)
    generator.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine.base, "forward_with_kv_cache", lambda *_: 1 / 0)
        broken = generator.submit(Prompt(text(0, 20)), GREEDY).result()
    assert (broken.finish, broken.error) == ("error", "ZeroDivisionError: division by zero")
    assert generator.submit(Prompt(text(0, 20)), GREEDY).result().tokens == expected
    deadline = time.monotonic() + 10
    while generator.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    generator.close()


def test_what_cannot_be_answered_is_said_at_once(llama: tuple[Engine, list[int]]) -> None:
    generator = generator_of(llama[0])
    with pytest.raises(RequestError, match="70 tokens and the model's maximum context length is 64"):
        generator.submit(Prompt(text(0, 70)), GREEDY)
    with pytest.raises(RequestError, match="no tokens"):
        generator.submit(Prompt(text(0, 0)), GREEDY)
    with pytest.raises(RequestError, match="there is no 97"):
        generator.submit(Prompt(text(0, 5)), GenerationConfig(logit_bias={97: 1.0}))
    answer = generator.submit(Prompt(text(0, 60)), GREEDY).result()
    assert (len(answer.tokens), answer.finish) == (4, "length")


def test_a_stretching_rotary_embedding_is_answered_by_itself() -> None:
    """LongRoPE reads all positions otherwise as soon as one is far away."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [4.0] * 4,
        "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 20,
    }
    engine, (one, _) = world("phi3", rope_parameters=rope, original_max_position_embeddings=20)
    prompts = [Prompt(text(0, 6), one), Prompt(text(1, 30), one), Prompt(text(2, 5))]
    expected = [alone(engine, prompt).tokens for prompt in prompts]
    generator = generator_of(engine)
    generations = [generator.submit(prompt, GREEDY) for prompt in prompts]
    assert [generation.result().tokens for generation in generations] == expected


def test_a_failure_before_anybody_runs_ends_those_who_wait(
    llama: tuple[Engine, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every step to come fails the same way, and nobody ever learns of it."""
    generator = generator_of(llama[0])
    monkeypatch.setattr(generator.schedule, "_admit", lambda sequence: 1 / 0)
    generator.start()
    try:
        waiting = [generator.submit(Prompt(text(seed, 5)), GREEDY) for seed in range(3)]
        answers = [each.result() for each in waiting]
    finally:
        generator.close()
    assert [answer.finish for answer in answers] == ["error"] * 3
    assert "ZeroDivisionError" in (answers[0].error or "")
    assert not generator.busy


def test_a_finished_answer_is_gone_with_whoever_holds_it(llama: tuple[Engine, list[int]]) -> None:
    """Without waiting for the collector of cycles: a listener often holds the answer it listens to."""
    generator = generator_of(llama[0])
    generation = generator.submit(Prompt(text(0, 4)), GREEDY)
    generation.listen(lambda chunk, generation=generation: None)
    generation.result()
    sequence = weakref.ref(generation._sequence)
    gc.disable()
    try:
        del generation
        assert sequence() is None
    finally:
        gc.enable()
