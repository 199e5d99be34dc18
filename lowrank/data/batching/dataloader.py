"""The dataloader: optimizer steps out of samples, epoch after epoch.

The order is a function of (seed, epoch) alone, so a dataloader's whole state is how many steps it has given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from lowrank.data.batching.packing import best_fit
from lowrank.data.config import DataConfig
from lowrank.errors import DataError
from lowrank.segments import Segment, number_the_step

Sample = tuple[Segment, ...]
"""What is never torn apart: a plain segment, the two of a pair, or a rated one and its mismatched one."""

_WINDOW = 4096
"""Samples of a stream that are shuffled and packed together."""


class DataLoader:
    """Steps over samples that are in memory.

    A step has `batch_size` samples (the last one of an epoch may have fewer), or with `batch_tokens` as many as best
    fit into that many tokens (a sample longer than that is a step by itself).
    """

    def __init__(self, samples: Sequence[Sample], config: DataConfig, seed: int) -> None:
        if not samples:
            raise DataError("the training set is empty")
        self._samples = samples
        self._lengths = [_length(sample) for sample in samples]
        self._tokens = sum(self._lengths)
        self._config = config
        self._seed = seed
        self._epoch = 0
        self._step = 0
        self._steps = self._plan(0)

    def again(self) -> DataLoader:
        """A dataloader of its own over the same samples, at its beginning."""
        return DataLoader(self._samples, self._config, self._seed)

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples of every epoch, in the order of the data."""
        return self._samples

    def samples_of_steps(self, num_steps: int) -> Sequence[Sample]:
        """What the first `num_steps` steps of all use, each once: all samples in the order of the data, or, where some
        are never used, those that are, as they come (so that those of fewer steps are their beginning)."""
        used: dict[int, None] = {}
        epoch = steps = 0
        while steps < num_steps and len(used) < len(self._samples):
            plan = self._plan(epoch)[: num_steps - steps]
            used.update(dict.fromkeys(index for step in plan for index in step))
            epoch, steps = epoch + 1, steps + len(plan)
        return self._samples if len(used) == len(self._samples) else [self._samples[index] for index in used]

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._samples)

    @property
    def steps_per_epoch(self) -> int:
        """Of the running epoch. What `batch_tokens` fills may be some more or fewer in another."""
        return len(self._steps)

    def steps_in(self, num_epochs: float) -> float:
        """Steps until so many epochs are over, from the beginning; a fraction where the last one is not whole."""
        if self._config.batch_tokens is None:
            return num_epochs * len(self._steps)
        counts = [len(self._plan(epoch)) for epoch in range(math.ceil(num_epochs))]
        return sum(counts) - (math.ceil(num_epochs) - num_epochs) * counts[-1]

    @property
    def epoch(self) -> float:
        """Epochs given so far, the running one as a fraction."""
        return self._epoch + self._step / len(self._steps)

    def next_step(self) -> list[Segment]:
        """The segments of the next optimizer step, numbered."""
        chosen = self._steps[self._step]
        self._step += 1
        if self._step == len(self._steps):
            self._epoch, self._step = self._epoch + 1, 0
            self._steps = self._plan(self._epoch)
        return _as_step([self._samples[index] for index in chosen])

    def peek_next_step(self) -> Sequence[Segment]:
        """The segments of the step that comes next, not numbered."""
        return [segment for index in self._steps[self._step] for segment in self._samples[index]]

    def heaviest_step(self) -> list[Segment]:
        """The segments of the step with the most tokens, of the running epoch; nothing is taken from the dataloader."""
        chosen = max(self._steps, key=lambda step: sum(self._lengths[index] for index in step))
        return _as_step([self._samples[index] for index in chosen])

    def tokens_of_steps(self) -> list[int]:
        """Of every step of the running epoch, in order."""
        return [sum(self._lengths[index] for index in step) for step in self._steps]

    def state(self) -> dict[str, Any]:
        """Plain JSON for `load_state`."""
        return {"epoch": self._epoch, "step": self._step, "samples": self.num_samples, "tokens": self._tokens}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError if these are not the same samples."""
        here = self.state()
        if (state["samples"], state["tokens"]) != (here["samples"], here["tokens"]):
            raise DataError(
                f"the data is not what this run began with: {here['samples']} samples of {here['tokens']} tokens now, "
                f"{state['samples']} of {state['tokens']} then\n  bring the old data back, or start a new run"
            )
        self._epoch, self._step = state["epoch"], state["step"]
        self._steps = self._plan(self._epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        return _plan(self._lengths, self._config, np.random.default_rng((self._seed, epoch)))


class StreamingDataLoader:
    """Steps over samples that are read as they are needed; `make_iterator` begins a new pass over them.

    Shuffled within a window of a few thousand samples, and packed there if `batch_tokens` is set. To resume, the
    epoch is read again up to where it stood.
    """

    def __init__(self, make_iterator: Callable[[], Iterator[Sample]], config: DataConfig, seed: int) -> None:
        self._make_iterator = make_iterator
        self._config = config
        self._seed = seed
        self._epoch = 0
        self._step = 0
        self._steps_seen: int | None = None
        self.media_kinds: frozenset[str] = frozenset()
        """The kinds of media of the samples read so far."""
        self._running = self._begin()
        self._waiting = self._first()

    @property
    def samples(self) -> Sequence[Sample]:
        """None are known beforehand."""
        return ()

    def samples_of_steps(self, num_steps: int) -> Sequence[Sample]:
        """None are known beforehand."""
        del num_steps
        return ()

    @property
    def num_samples(self) -> None:
        """Not known before the end."""
        return None

    @property
    def steps_per_epoch(self) -> None:
        """Not known before the end."""
        return None

    def steps_in(self, num_epochs: float) -> float:
        """None can be counted beforehand."""
        del num_epochs
        return 0.0

    @property
    def epoch(self) -> float:
        """Epochs given so far; fractions are known after the first."""
        return self._epoch + (self._step / self._steps_seen if self._steps_seen else 0.0)

    def next_step(self) -> list[Segment]:
        """The segments of the next optimizer step, numbered."""
        step = self._waiting
        following = next(self._running, None)  # first: where it breaks off, `state` is that before this step
        self._step += 1
        if following is None:
            self._epoch, self._step, self._steps_seen = self._epoch + 1, 0, self._step
            self._running = self._begin()
            following = self._first()
        self._waiting = following
        return step

    def peek_next_step(self) -> Sequence[Segment]:
        """The segments of the step that comes next."""
        return self._waiting

    def heaviest_step(self) -> list[Segment]:
        """The segments of the next step: the only one that is known. Nothing is taken from the dataloader."""
        return self._waiting

    def tokens_of_steps(self) -> list[int]:
        """Of the next step."""
        return [sum(map(len, self._waiting))]

    def state(self) -> dict[str, Any]:
        """Plain JSON for `load_state`."""
        return {"epoch": self._epoch, "step": self._step, "steps_seen": self._steps_seen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError if the stream has become shorter."""
        self._epoch, self._step, self._steps_seen = state["epoch"], state["step"], state["steps_seen"]
        self._running = self._begin()
        following = next(islice(self._running, self._step, None), None)
        if following is None:
            raise DataError(
                f"the data is not what this run began with: step {self._step + 1} of the epoch is beyond its end\n"
                "  bring the old data back, or start a new run"
            )
        self._waiting = following

    def _first(self) -> list[Segment]:
        step = next(self._running, None)
        if step is None:
            raise DataError("the training set is empty")
        return step

    def _begin(self) -> Iterator[list[Segment]]:
        """The steps of the epoch that `self._epoch` names."""
        rng = np.random.default_rng((self._seed, self._epoch))
        source = self._make_iterator()
        window: list[Sample] = []
        while True:
            fresh = list(islice(source, _WINDOW))
            window += fresh
            self.media_kinds |= {
                each.kind for sample in fresh for one in sample if one.media for each in one.media.items
            }
            if not window:
                return
            plan = _plan([_length(sample) for sample in window], self._config, rng)
            kept = plan.pop(self._unfinished(plan, window)) if fresh else []
            for chosen in plan:
                yield _as_step([window[index] for index in chosen])
            window = [window[index] for index in kept]

    def _unfinished(self, plan: list[list[int]], window: list[Sample]) -> int:
        """The step that waits for more samples: the last one, or the one with most room left."""
        if self._config.batch_tokens is None:
            return len(plan) - 1
        return min(range(len(plan)), key=lambda step: sum(_length(window[index]) for index in plan[step]))


def _plan(lengths: Sequence[int], config: DataConfig, rng: np.random.Generator) -> list[list[int]]:
    """Which samples make up each step of an epoch or window."""
    order = rng.permutation(len(lengths)).tolist() if config.shuffle else list(range(len(lengths)))
    if config.batch_tokens is None:
        return [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    bins = best_fit([lengths[index] for index in order], config.batch_tokens)
    if config.shuffle:  # the last bins are the least full, and miss the short samples that filled up the others
        bins = [bins[place] for place in rng.permutation(len(bins)).tolist()]
    return [[order[place] for place in members] for members in bins]


def _length(sample: Iterable[Segment]) -> int:
    return sum(len(segment) for segment in sample)


def _as_step(samples: Sequence[Sample]) -> list[Segment]:
    """The segments of the samples, pairs numbered from 0, origins counted."""
    segments: list[Segment] = []
    pairs = 0
    for sample in samples:
        paired = sample[0].pair >= 0
        segments += [replace(segment, pair=pairs) if paired else segment for segment in sample]
        pairs += paired
    return number_the_step(segments)
