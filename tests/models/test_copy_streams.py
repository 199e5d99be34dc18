"""The two streams of a base in host memory, on streams that only write down what waits for what: no GPU is here.

Every operator of the base is noted with what has happened before it for certain. A layer's weights must have come
before they are used, and nothing may be copied to memory before everything is computed that used what was there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.adapters.variants.dora import DoraConfig
from lowrank.models import host_blocks, streamed
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.host_blocks import OwnBlocks
from lowrank.models.streamed import Streamed
from tests.models.sharded_ranks import base_of
from tests.tiny_models import make_engine, random_step

CPU = torch.device("cpu")


@dataclass
class Stream:
    """`seen`: operations of each stream that have ended before the next one of this begins."""

    device: Any = None
    done: int = 0
    seen: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def operation(self) -> dict[int, int]:
        before = dict(self.seen)
        self.done += 1
        self.seen[id(self)] = self.done
        return before

    def record_event(self) -> dict[int, int]:
        return dict(self.seen)

    def wait_event(self, event: dict[int, int]) -> None:
        for stream, count in event.items():
            self.seen[stream] = max(self.seen[stream], count)


class Watch(TorchDispatchMode):
    """Operators that touch a layer's memory."""

    def __init__(self, compute: Stream) -> None:
        super().__init__()
        self.compute = self.current = compute
        self.copied: dict[int, tuple[int, int]] = {}
        """Stream and number of the last copy into a layer."""
        self.used: dict[int, int] = {}
        self.copies = self.uses = 0
        self.blocks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_block = {block._device.untyped_storage()._cdata: block for block in self.blocks}
        touched = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        for key in touched & of_block.keys():
            before = self.current.operation()
            if func is torch.ops.aten.copy_.default and self.current is not self.compute:
                self.copies += 1
                self.copied[key] = (id(self.current), self.current.done)
                gone = [other for other, block in of_block.items() if not block.is_there or other == key]
                last = max((self.used.get(other, 0) for other in gone), default=0)
                assert before.get(id(self.compute), 0) >= last, "copied over what is still computed with"
            elif func not in (torch.ops.aten.view.default, torch.ops.aten.t.default, torch.ops.aten.detach.default):
                self.uses += 1
                stream, number = self.copied[key]
                assert self.current is self.compute
                assert before.get(stream, 0) >= number, "computed with what may not have come"
                self.used[key] = self.current.done
        return func(*args, **kwargs)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    compute = Stream()
    watch = Watch(compute)

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        before, watch.current = watch.current, stream
        yield
        watch.current = before

    class Way(streamed._Way):
        def __init__(self, device: torch.device) -> None:
            self.device, self.on_gpu, self._left = device, True, None
            self._stream = Stream(device)

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: watch.current)
    monkeypatch.setattr(streamed, "_Way", Way)
    monkeypatch.setattr(host_blocks, "pinned", lambda block: block)
    return watch


@pytest.mark.parametrize("policy", ["none", "full"])
def test_weights_come_before_their_use_and_go_after_it(watch: Watch, policy: Any) -> None:
    placement = Streamed(CPU)
    base = base_of("llama", "dense", torch.float32, placement)
    set_activation_checkpointing(base.model, policy)
    engine, (slot,) = make_engine(base, DoraConfig(rank=4))
    watch.blocks = placement._blocks
    for block in placement._blocks:
        block.leave()
    with watch:
        for number in range(2):
            engine.forward_backward({slot: random_step(number, (9, 12))})
            engine.optim_step(slot, 0.01)
        engine.evaluate({slot: random_step(3, (5,))})
    layers = len(placement._blocks)
    assert watch.copies >= 2 * (2 * layers - 2)
    assert watch.uses > 50 * layers


class Runtime:
    """As much of CUDA's as pins memory. It knows an address once, as the real one does."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudart(self) -> Runtime:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if address in self.pinned or size > 1 << 20:
            return 712 if address in self.pinned else 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_memory_is_as_large_as_asked_for_and_let_go_of_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", runtime.cudart)
    blocks = [OwnBlocks(pin=True).block(5000, lambda block: block.fill_(3)) for _ in range(2)]
    assert all(block.eq(3).all() for block in blocks)
    assert sorted(runtime.pinned.values()) == [5000, 5000]
    assert all(block.data_ptr() % 4096 == 0 for block in blocks)
    del blocks
    assert runtime.pinned == {}
    with pytest.raises(host_blocks.ModelError, match=r"cannot pin 0\.00 GB.*error 2.*ulimit -l"):
        OwnBlocks(pin=True).block(2 << 20, lambda block: None)
