"""Exporting a model: a base on disk and the adapters trained on it, in the form that the user runs.

    Source --target.write--> a folder --target.read_back--> ExportReader --verify--> is it the model that was trained?

A *target* (targets/, one file each) writes one form. It gets a `Source` and an empty folder, which the caller renames
into its place when everything in it is written, and says for each file that can be run how it is read back. What is
read back answers as an `ExportReader`, so that one function (export/verify/compare.py) compares every target with
base + adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from lowrank.export.source import Source


@dataclass(frozen=True)
class Needs:
    """What writing will take, known before anything is written."""

    disk_bytes: int
    """Free space on the disk of the target folder, temporary files in it included."""
    memory_bytes: int
    """Main memory at the peak, without what can be paged out to the base's own files."""
    notes: tuple[str, ...] = ()
    """What a person should know beforehand, in whole sentences."""
    installs: tuple[Install, ...] = ()
    """What has to be fetched first, in this order."""


@dataclass(frozen=True)
class Install:
    """A program that a target runs and that lowrank does not bring; kept apart from the environment of this one."""

    description: str
    """What is fetched from where, how much, and where it is kept: said before it happens."""
    make: Callable[[], None]
    """Fetches it. Raises ModelError if that cannot be, or if it turns out that it would not help."""


@dataclass(frozen=True)
class Tolerance:
    """How far a target may be from base + adapter. Each target states its own; a gap above it fails the export."""

    mean_kl: float
    """Mean over held-out tokens of KL(base + adapter || target) of the next-token distribution, in nats."""
    top1_agreement: float
    """Least share of tokens at which both have the same likeliest next token. Over few of them three standard errors
    less."""
    perplexity: float
    """Relative difference of the perplexities on the held-out tokens, for each nat of a loss that is above 1."""
    gain_lost: float | None = None
    """Of what training gained in held-out loss over the bare base, the share that may be lost."""
    remedy: str = ""
    """What to do where a target is further away than this."""


class ExportReader(Protocol):
    """A model as it is run from what was written. Tokens are those of the base's tokenizer."""

    def logprobs(self, token_L: np.ndarray, prompt: int | None = None) -> np.ndarray:
        """(L) int64 tokens of one document -> (L, V) float32 log-probabilities of the token that follows each.

        V is the width of the model's head; columns past the shorter of two heads are not compared. `prompt`: how many
        of its first tokens ask, which a prefix language model reads both ways; None: all.
        """
        ...

    def greedy(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        on_answered: Callable[[int], None],
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, without the stop token. `on_answered` is called with the number of
        those that are answered."""
        ...

    def __enter__(self) -> ExportReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory back, end the process behind it."""
        ...


@dataclass(frozen=True)
class ImageQuestion:
    """A question about a picture, and its answer."""

    before_L: np.ndarray
    """int64 tokens before what stands for the picture."""
    pixels_HWC: np.ndarray
    """(height, width, 3) uint8."""
    length: int
    """Tokens that stand for the picture, in training."""
    after_L: np.ndarray
    """int64 tokens behind it: the rest of the question, and the answer."""
    rows: int
    """How many of the last of these are compared."""


@runtime_checkable
class ImageReader(Protocol):
    """An `ExportReader` that also takes pictures."""

    def image_logprobs(self, question: ImageQuestion) -> tuple[np.ndarray, int]:
        """Log-probabilities after each of the last `rows` tokens, (rows, V) float32; and how many tokens stand for the
        picture here."""
        ...


@dataclass(frozen=True)
class ReadBack:
    """One thing in a target's folder that can be run."""

    name: str
    """For people and export.json: `merged`, or a file name where a target writes several."""
    tolerance: Tolerance
    open: Callable[[], ExportReader]
    """Loads it; used as a context."""
    against: ReadBack | None = None
    """What it was rounded from: its distributions may not be further from this one's than `tolerance` says either."""
    temporary: tuple[Path, ...] = ()
    """Files that are there for the comparison only."""
    compares_images: bool = False
    """It is compared on a picture as well: its reader is an `ImageReader`."""
    compares_text: bool = True
    """It is compared on the documents. False: it is there for pictures alone."""


class ExportProgress(Protocol):
    """Called with how far writing is, so that the time left can be shown."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` bytes of work; `what`: at present."""
        ...


class ExportTarget(Protocol):
    """One form of a model. Raises ModelError or OutputError for what cannot be written, in `needs`, before any work."""

    def needs(self, source: Source) -> Needs:
        """Check that this source can take this form, and say what it takes."""
        ...

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """Write into the empty `folder`; sentences about what was written, for the user."""
        ...

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """What in `folder` (in its final place) can be run, each with its tolerance."""
        ...

    def usage(self, source: Source, path: str) -> str:
        """Markdown for the model card: how what lies at `path` (a folder or a hub name) is run."""
        ...


@runtime_checkable
class WritesParts(Protocol):
    """A target of several files, of which one that cannot be written keeps no other from it."""

    failures: dict[str, Exception]
    """What the last `write` could not write, by name, and why."""
