"""Reference log-probabilities: those of the reference model, by default the bare base, for objectives such as DPO.

The bare base is the run's own base without adapter (slot -1). They are computed before the first update, once for all
jobs on the same data, and cached on disk for later runs. In a folder per model (a digest of its weights and
configuration), a file has a few hundred neighboring segments and is named by a digest of their tokens, so rows appended
to a dataset leave the earlier files valid."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.atomic import new_file
from lowrank.checkpoints.full_model import unwrapped_state
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.errors import ModelError
from lowrank.kernels.cache_folder import cache_folder
from lowrank.models.placement import whole_tensor
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.job import PeekableSteps, StepSource

_SEGMENTS_PER_FILE = 256
_SAMPLED = 4096
"""How many values of each tensor go into a model's digest."""

OnProgress = Callable[[int, int, float], None]
"""`(segments done, segments in all, seconds left)`, after every file."""


def references_folder() -> Path:
    """Return the cache folder, which may be deleted at any time."""
    return cache_folder() / "references"


def digest_of_model(model: torch.nn.Module) -> str:
    """Return a digest of a model's weights, dtypes and configuration. Of large tensors it covers values at even
    distances, since training changes all of them."""
    digest = blake2b(digest_size=16)
    config: Any = model.config
    settings = config.to_dict()
    described = {key: value for key, value in settings.items() if not key.startswith(("_", "transformers_version"))}
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(unwrapped_state(model).items()):
        if ".copies." in name:  # of modules that an adapter trains in full; the bare base does not use them
            continue
        flat = whole_tensor(tensor.detach()).reshape(-1)
        sampled = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sampled.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class References:
    """Reference log-probabilities of segments, by their content. `folder`: of the cache on disk; None: none. `slot`: of
    the adapter of the reference model, by default none."""

    def __init__(self, engine: Engine, folder: Path | None, slot: int = BASE_SLOT) -> None:
        self._engine: Engine | None = engine
        self._slot = slot
        self._folder = folder / digest_of_model(engine.base.model) if folder else None
        media_encoder = engine.base.media_encoder
        self._limits = f" {media_encoder.processor.limits}" if media_encoder else ""
        self._known: dict[bytes, np.ndarray] = {}
        """Float32 log-probabilities of the tokens that carry weight, by a segment's key."""
        self.num_computed = self.num_found = 0
        self.problem: str | None = None
        """Why nothing could be written to disk."""

    def prepare(self, segments: Iterable[Segment], on_progress: OnProgress | None = None) -> None:
        """Read or compute the references of all `segments`. Called before the base is trained."""
        waiting = {self._key(segment): segment for segment in segments}
        waiting = {key: segment for key, segment in waiting.items() if key not in self._known}
        total, done, computed, seconds = len(waiting), 0, 0, 0.0
        source = iter(waiting.items())
        while part := dict(islice(source, _SEGMENTS_PER_FILE)):
            started = time.perf_counter()
            if not self._known_to_all(self._read(part)):
                self._compute(part)
                self._write(part)
                computed += len(part)
                seconds += time.perf_counter() - started
            done += len(part)
            if on_progress:
                on_progress(done, total, (total - done) * seconds / computed if computed else 0.0)

    def _known_to_all(self, known: bool) -> bool:
        """Return whether all ranks know them. Otherwise all compute, also those that have found them."""
        assert self._engine is not None, "there are segments to be prepared"
        return all(self._engine.lanes.ranks.exchange(known))

    def attach(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments with their `reference_L`. What is not known yet is computed and not kept."""
        missing = {key: segment for segment in segments if (key := self._key(segment)) not in self._known}
        if missing:
            self._compute(missing)
        attached = [self._attached(segment) for segment in segments]
        for key in missing:
            del self._known[key]
        return attached

    def _key(self, segment: Segment) -> bytes:
        return _key(segment, self._limits)

    def release_model(self) -> None:
        """Drop the model, since nothing more has to be computed."""
        self._engine = None

    def _attached(self, segment: Segment) -> Segment:
        reference_L = np.zeros(len(segment), np.float32)
        reference_L[segment.weight_L != 0] = self._known[self._key(segment)]
        return replace(segment, reference_L=reference_L)

    def _compute(self, part: dict[bytes, Segment]) -> None:
        assert self._engine is not None, "a segment that was not prepared"
        scored = self._engine.logprobs(self._slot, list(part.values()))
        for (key, segment), logprob_L in zip(part.items(), scored):
            self._known[key] = logprob_L[segment.weight_L != 0]
        self.num_computed += len(part)

    def _path(self, part: dict[bytes, Segment]) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{blake2b(b''.join(part), digest_size=16).hexdigest()}.safetensors"

    def _read(self, part: dict[bytes, Segment]) -> bool:
        path = self._path(part)
        if path is None or not path.is_file():
            return False
        try:
            logprob_K = read_tensors(path)["logprob"].numpy()
        except (ModelError, KeyError):
            return False  # damaged: computed again and overwritten
        lengths = [int((segment.weight_L != 0).sum()) for segment in part.values()]
        if sum(lengths) != len(logprob_K):
            return False
        self._known.update(zip(part, np.split(logprob_K, np.cumsum(lengths)[:-1])))
        self.num_found += len(part)
        return True

    def _write(self, part: dict[bytes, Segment]) -> None:
        path = self._path(part)
        if path is None or self.problem or (self._engine is not None and self._engine.lanes.ranks.rank):
            return
        logprob_K = torch.from_numpy(np.concatenate([self._known[key] for key in part]))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                write_tensors(partial, {"logprob": logprob_K})
        except OSError as error:
            self.problem = f"reference log-probabilities cannot be written to {path.parent}: {error}"


class ReferencedSteps:
    """A dataloader whose segments have their reference log-probabilities."""

    def __init__(self, steps: StepSource, references: References) -> None:
        self._steps = steps
        self._references = references

    @property
    def epoch(self) -> float:
        """See StepSource."""
        return self._steps.epoch

    def next_step(self) -> list[Segment]:
        """See StepSource."""
        return self._references.attach(self._steps.next_step())

    def peek_next_step(self) -> Sequence[Segment]:
        """See PeekableSteps. Without references."""
        return self._steps.peek_next_step() if isinstance(self._steps, PeekableSteps) else ()

    def state(self) -> dict[str, Any]:
        """See StepSource."""
        return self._steps.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See StepSource."""
        self._steps.load_state(state)


def _key(segment: Segment, limits: str) -> bytes:
    """Return a digest of a segment's tokens, of which of them carry weight, and of its media with the size limits."""
    tokens = np.ascontiguousarray(segment.token_L, np.int64).tobytes()
    carried = np.packbits(segment.weight_L != 0).tobytes()
    media = "" if segment.media is None else " ".join([*(each.digest for each in segment.media.items), limits])
    return blake2b(tokens + carried + media.encode(), digest_size=16).digest()
