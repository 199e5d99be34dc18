"""Memory runs out in the middle of a step: the step is done again in smaller pieces, and nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import Batch
from lowrank.errors import ModelError
from lowrank.train.engine import Engine
from lowrank.train.out_of_memory import explain_out_of_memory, is_out_of_memory
from tests.tiny_models import make_base, make_engine, random_step

LENGTHS = [9, 20, 6, 14]


def of_cuda() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def of_cpu() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"
    )


def limit(engine: Engine, tokens: int, error: Callable[[], Exception], backward: bool) -> list[int]:
    """Let forward passes of more than `tokens` tokens fail, in the backward pass or before; the sizes tried."""
    hidden, tried = engine.base.hidden, []

    def limited(batch: Batch, **how: Any) -> torch.Tensor:
        tried.append(batch.num_tokens)
        if batch.num_tokens <= tokens:
            return hidden(batch, **how)
        if not backward:
            raise error()
        result = hidden(batch, **how)
        if result.requires_grad:
            result.register_hook(lambda _: _fail(error))
        return result

    engine.base.hidden = limited  # type: ignore[method-assign]
    return tried


def _fail(error: Callable[[], Exception]) -> None:
    raise error()


def step(engine: Engine, slots: list[int]) -> tuple[list[float], list[torch.Tensor]]:
    done = engine.forward_backward({slot: random_step(slot, LENGTHS) for slot in slots})
    grads = [p.grad for slot in slots for p in engine.bank.parameters(slot).values()]
    return [done[slot].loss for slot in slots], [each for each in grads if each is not None]


@pytest.mark.parametrize(("error", "backward"), [(of_cuda, False), (of_cpu, True), (MemoryError, False)])
def test_the_step_is_done_again_in_smaller_pieces(error: Callable[[], Exception], backward: bool) -> None:
    jobs = (LoraConfig(rank=4, dropout=0.3), LoraConfig(rank=2))
    engine, slots = make_engine(make_base("llama"), *jobs, micro_batch_tokens=60)
    expected, gradients = step(engine, slots)

    engine, slots = make_engine(make_base("llama"), *jobs, micro_batch_tokens=60)
    received: list[str] = []
    engine.notify = received.append
    tried = limit(engine, 25, error, backward)
    losses, again = step(engine, slots)
    assert max(tried) > 25
    assert losses == pytest.approx(expected, rel=1e-12)
    for one, other in zip(gradients, again):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
    assert received
    assert all("out of memory in a forward pass of" in text and "micro_batch_tokens" in text for text in received)
    assert engine.micro_batch_tokens <= 29
    count = len(received)
    for slot in slots:
        engine.optim_step(slot, 1e-3)
    step(engine, slots)
    assert len(received) == count, "later steps know the size that fits"


def test_an_evaluation_is_done_again_too() -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4), micro_batch_tokens=60)
    work = {slots[0]: random_step(0, LENGTHS)}
    expected = engine.evaluate(work)[slots[0]].loss
    engine.notify = lambda text: None
    limit(engine, 25, of_cpu, backward=False)
    assert engine.evaluate(work)[slots[0]].loss == pytest.approx(expected, rel=1e-12)


def test_where_a_single_segment_does_not_fit() -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4), micro_batch_tokens=60)
    engine.notify = lambda text: None
    limit(engine, 10, of_cpu, backward=False)
    with pytest.raises(ModelError, match="out of memory while computing a forward pass that cannot be cut smaller"):
        step(engine, slots)


def test_gradients_of_before_are_not_lost() -> None:
    """A caller who accumulates steps would lose what is there if it were cleared."""
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4), micro_batch_tokens=60)
    _, before = step(engine, slots)
    kept = [each.clone() for each in before]
    limit(engine, 25, of_cpu, backward=False)
    with pytest.raises(ModelError, match="out of memory"):
        step(engine, slots)
    assert all(torch.equal(one, other) for one, other in zip(kept, before))


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("training"):
        raise RuntimeError("shapes do not match")


SCRIPT = """
    import resource
    import numpy as np
    import torch

    from lowrank.adapters.variants.lora import LoraConfig as Lora
    from lowrank.segments import Segment, number_the_step
    from tests.tiny_models import make_base, make_engine

    base = make_base("llama", torch.float32, intermediate_size=8192)
    engine, (slot,) = make_engine(base, Lora(rank=2, target_modules=("down_proj",)), micro_batch_tokens=1024)
    engine.notify = lambda text: print("HEARD", text)
    work = {slot: number_the_step([Segment(np.arange(3, 67), np.ones(64, np.float32)) for _ in range(16)])}
    print("LOSS", engine.forward_backward(work)[slot].loss, engine.micro_batch_tokens)
    engine._clear_gradients(work)
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)
    print("LOSS", engine.forward_backward(work)[slot].loss, engine.micro_batch_tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_memory_that_really_runs_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    plenty, little = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOSS"))
    assert "HEARD out of memory in a forward pass of 1024 tokens" in done.stdout, done.stderr
    assert float(plenty[0]) == pytest.approx(float(little[0]), rel=1e-6)
    assert int(little[1]) < int(plenty[1]) == 1024
