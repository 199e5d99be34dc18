"""Feeds: every sample once an epoch, steps as set, resumed to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lowrank.data.batching.dataloader import DataLoader, StreamingDataLoader
from lowrank.data.config import DataConfig
from lowrank.errors import DataError
from lowrank.segments import CHOSEN, REJECTED, Segment

Sample = tuple[Segment, ...]


def samples_of(count: int, pairs: bool = False, seed: int = 0) -> list[Sample]:
    draw = np.random.default_rng(seed)

    def segment(number: int, **more: Any) -> Segment:
        tokens = np.full(draw.integers(2, 40), number, np.int32)
        return Segment(tokens, np.ones(len(tokens), np.float32), **more)

    if pairs:
        return [(segment(n, pair=0, role=CHOSEN), segment(n, pair=0, role=REJECTED)) for n in range(count)]
    return [(segment(number),) for number in range(count)]


def bits(step: list[Segment]) -> list[Any]:
    return [(s.token_L.tolist(), s.weight_L.tolist(), s.pair, s.role, s.origin) for s in step]


def rows(step: list[Segment]) -> list[int]:
    return [int(segment.token_L[0]) for segment in step]


def make(kind: str, samples: list[Sample], config: DataConfig, seed: int) -> DataLoader | StreamingDataLoader:
    return (
        DataLoader(samples, config, seed)
        if kind == "memory"
        else StreamingDataLoader(lambda: iter(samples), config, seed)
    )


KINDS = pytest.mark.parametrize("kind", ["memory", "stream"])


@KINDS
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_sample_once(kind: str, shuffle: bool) -> None:
    dataloader = make(kind, samples_of(50), DataConfig(batch_size=8, shuffle=shuffle), 0)
    epochs = []
    for _ in range(3):
        steps = [dataloader.next_step() for _ in range(7)]
        assert [len(step) for step in steps] == [8] * 6 + [2]
        epochs.append([row for step in steps for row in rows(step)])
        assert sorted(epochs[-1]) == list(range(50))
    assert dataloader.epoch == 3.0
    assert (epochs[0] == list(range(50))) is not shuffle
    assert (epochs[0] == epochs[1]) is not shuffle


@KINDS
@pytest.mark.parametrize("shuffle", [False, True])
def test_batch_tokens_fill_steps(kind: str, shuffle: bool) -> None:
    samples = samples_of(200)
    dataloader = make(kind, samples, DataConfig(batch_tokens=100, shuffle=shuffle), 0)
    tokens = sum(len(sample[0]) for sample in samples)
    expected = dataloader.steps_per_epoch
    seen: list[int] = []
    steps = 0
    while len(seen) < 200:
        step = dataloader.next_step()
        steps += 1
        assert sum(map(len, step)) <= 100
        seen += rows(step)
    assert sorted(seen) == list(range(200))
    assert steps <= 1.1 * tokens / 100
    assert expected == (steps if kind == "memory" else None)


def test_steps_of_epochs_are_counted_before() -> None:
    """Each epoch fills its steps anew, so they may be some more or fewer."""
    dataloader = DataLoader(samples_of(300), DataConfig(batch_tokens=45), 3)
    counts = []
    for epoch in range(5):
        counts.append(dataloader.steps_per_epoch)
        seen = [row for _ in range(counts[-1]) for row in rows(dataloader.next_step())]
        assert sorted(seen) == list(range(300))
        assert dataloader.epoch == epoch + 1
    assert len(set(counts)) > 1
    fresh = dataloader.again()
    assert [fresh.steps_in(epoch + 1) for epoch in range(5)] == np.cumsum(counts).tolist()
    assert fresh.steps_in(2.5) == sum(counts[:2]) + 0.5 * counts[2]
    assert DataLoader(samples_of(300), DataConfig(batch_size=7), 3).steps_in(1.5) == 1.5 * 43


def test_a_sample_longer_than_the_step_stands_alone() -> None:
    dataloader = DataLoader(samples_of(20), DataConfig(batch_tokens=10), 0)
    for _ in range(dataloader.steps_per_epoch):
        step = dataloader.next_step()
        assert sum(map(len, step)) <= 10 or len(step) == 1


@KINDS
@pytest.mark.parametrize("settings", [{"batch_size": 7}, {"batch_tokens": 150}, {"batch_size": 5, "shuffle": False}])
@pytest.mark.parametrize("pairs", [False, True])
def test_resumed_feeds_go_on_to_the_same_bits(kind: str, settings: dict[str, Any], pairs: bool) -> None:
    samples, config = samples_of(40, pairs), DataConfig(**settings)
    whole = make(kind, samples, config, 5)
    states, steps = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(whole.state())))
        steps.append(bits(whole.next_step()))
    for start in range(0, 30, 3):
        resumed = make(kind, samples, config, 5)
        resumed.load_state(states[start])
        assert resumed.state() == states[start]
        assert [bits(resumed.next_step()) for _ in range(start, 30)] == steps[start:]


@KINDS
def test_order_is_a_function_of_seed_and_epoch(kind: str) -> None:
    def epoch_of(seed: int) -> list[int]:
        dataloader = make(kind, samples_of(64), DataConfig(batch_size=64), seed)
        return rows(dataloader.next_step())

    assert epoch_of(1) == epoch_of(1)
    assert epoch_of(1) != epoch_of(2)


def test_pairs_stay_together_and_are_numbered_in_the_step() -> None:
    dataloader = DataLoader(samples_of(10, pairs=True), DataConfig(batch_size=4), 0)
    for size in (4, 4, 2):
        step = dataloader.next_step()
        assert [segment.pair for segment in step] == [pair for pair in range(size) for _ in range(2)]
        assert [segment.role for segment in step] == [CHOSEN, REJECTED] * size
        assert [segment.origin for segment in step] == [0, *np.cumsum([len(s) for s in step])[:-1].tolist()]


def test_progress() -> None:
    dataloader = DataLoader(samples_of(10), DataConfig(batch_size=4), 0)
    assert (dataloader.num_samples, dataloader.steps_per_epoch, dataloader.epoch) == (10, 3, 0.0)
    dataloader.next_step()
    assert dataloader.epoch == pytest.approx(1 / 3)


def test_changed_or_missing_data_is_told() -> None:
    dataloader = DataLoader(samples_of(10), DataConfig(), 0)
    with pytest.raises(DataError, match=r"10 samples of \d+ tokens now, 11 of \d+ then"):
        dataloader.load_state(DataLoader(samples_of(11), DataConfig(), 0).state())
    with pytest.raises(DataError, match="the training set is empty"):
        DataLoader([], DataConfig(), 0)
    with pytest.raises(DataError, match="the training set is empty"):
        StreamingDataLoader(lambda: iter([]), DataConfig(), 0)
    short = StreamingDataLoader(lambda: iter(samples_of(10)), DataConfig(batch_size=5), 0)
    with pytest.raises(DataError, match="beyond its end"):
        short.load_state({"epoch": 0, "step": 9, "steps_seen": None})


def test_streams_larger_than_a_window() -> None:
    count = 10_000
    tokens, weights = np.zeros(3, np.int32), np.ones(3, np.float32)

    def stream() -> Iterator[Sample]:
        for number in range(count):
            yield (Segment(tokens + number, weights),)

    make_stream: Callable[[], Iterator[Sample]] = stream
    for config in (DataConfig(batch_size=96), DataConfig(batch_tokens=300), DataConfig(batch_size=5000)):
        dataloader = StreamingDataLoader(make_stream, config, 0)
        per_step = config.batch_size if config.batch_tokens is None else 100
        seen: list[int] = []
        sizes = []
        while dataloader.epoch < 1:
            step = dataloader.next_step()
            sizes.append(len(step))
            seen += rows(step)
        assert sorted(seen) == list(range(count))
        assert sizes[:-1] == [per_step] * (len(sizes) - 1)
        assert dataloader.steps_per_epoch is None
        assert dataloader.num_samples is None


@pytest.mark.parametrize("more", [{"batch_size": 8}, {"batch_tokens": 100}])
@pytest.mark.parametrize("num_steps", [0, 1, 3, 100])
def test_what_the_first_steps_use_is_known_before(num_steps: int, more: dict[str, Any]) -> None:
    samples = samples_of(50)
    dataloader = DataLoader(samples, DataConfig(**more), 0)
    known = [int(sample[0].token_L[0]) for sample in dataloader.samples_of_steps(num_steps)]
    used = list(dict.fromkeys(row for _ in range(num_steps) for row in rows(dataloader.next_step())))
    assert known == (used if len(used) < 50 else list(range(50)))
    fewer = [int(sample[0].token_L[0]) for sample in DataLoader(samples, DataConfig(**more), 0).samples_of_steps(1)]
    assert num_steps not in (1, 3) or known[: len(fewer)] == fewer
