"""What can be known before an export: where each target goes, whether it may, and whether there is room."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from lowrank.errors import ModelError, OutputError, is_disk_full, is_disk_full_message, raise_all
from lowrank.export import ExportTarget, Needs
from lowrank.export.source import Source
from lowrank.export.targets import TargetConfig
from lowrank.export.verify.compare import STORE_BYTES
from lowrank.export.writing.sizes import format_size
from lowrank.models.loading.checkpoint_files import CheckpointFiles
from lowrank.pipelines.export_source import ResolvedSource
from lowrank.pipelines.target_failures import TargetFailures

_OVERHEAD = 1.2
"""Memory of a loaded model over its weights: activations, caches, the adapter."""


@dataclass(frozen=True)
class ExportRequest:
    """A target and where it goes."""

    config: TargetConfig
    folder: Path

    @property
    def type(self) -> str:
        """The target's name."""
        return self.config.type


def export_requests(targets: Sequence[TargetConfig], folder: Path) -> list[ExportRequest]:
    """One target goes to `folder`, several each to a folder in it named after the target."""
    if len(targets) == 1:
        return [ExportRequest(targets[0], folder)]
    return [ExportRequest(target, folder / target.type) for target in targets]


@dataclass(frozen=True)
class CheckedTarget:
    """A target that can be written, as far as is known beforehand."""

    request: ExportRequest
    target: ExportTarget
    needs: Needs


def checked_targets(
    requests: Sequence[ExportRequest], found: ResolvedSource, failures: TargetFailures
) -> list[CheckedTarget]:
    """Those whose place is free and which can take this source."""
    built = []
    for each in requests:
        with failures.of(each.type):
            _refuse_place(each, found)
            target = each.config.build()
            built.append(CheckedTarget(each, target, target.needs(found.source)))
    failures.raise_if_none_is_left()
    return built


def _refuse_place(request: ExportRequest, found: ResolvedSource) -> None:
    """Nothing is written over, and nothing into what it is made of."""
    problems = []
    if request.folder.exists() and not request.folder.is_dir():
        problems.append(f"{request.folder} is a file")
    elif request.folder.is_dir() and any(request.folder.iterdir()):
        problems.append(
            f"{request.folder} is not empty; choose another folder (-o FOLDER, output=...), or empty it yourself"
        )
    inside = request.folder.resolve()
    for origin in {found.folder.resolve(), found.source.base.resolve()}:
        if origin.is_dir() and (inside == origin or origin in inside.parents):
            problems.append(f"{request.folder} is inside of what is exported ({origin}); choose a folder outside")
    raise_all(OutputError, "an export cannot go there", problems)


def check_room(built: Sequence[CheckedTarget], failures: TargetFailures) -> None:
    """Enough disk for each beside those before it, enough memory for each."""
    taken: dict[Path, int] = {}
    memory = psutil.virtual_memory().available
    for each in built:
        with failures.of(each.request.type):
            problems = []
            folder, needs = each.request.folder, each.needs
            parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
            wanted, free = taken.get(parent, 0) + needs.disk_bytes, shutil.disk_usage(parent).free
            if wanted > free:
                problems.append(f"{format_size(wanted)} of disk are needed in {parent}, {format_size(free)} are free")
            if needs.memory_bytes > memory:
                size = format_size(needs.memory_bytes)
                problems.append(f"{each.request.type} needs {size} of memory, {format_size(memory)} are free")
            raise_all(OutputError, "there is not enough room", problems)
            taken[parent] = wanted


def where_to_verify(source: Source) -> tuple[Source, str]:
    """Float32 where it fits, else 16 bits; the GPU if it fits there, else the processor."""
    size = sum(torch.Size(entry.shape).numel() for entry in CheckpointFiles(source.base).values())
    rooms = []
    if source.model.device != "cpu" and torch.cuda.is_available():
        rooms.append(("cuda", torch.cuda.mem_get_info()[0], 0))
    rooms.append(("cpu", psutil.virtual_memory().available, STORE_BYTES))
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        need = int(_OVERHEAD * size * width) + (256 << 20)
        for device, free, besides in rooms:
            if need + besides <= free:
                model = source.model.model_copy(update={"dtype": dtype, "device": device})
                where = "the GPU" if device == "cuda" else "the processor"
                return replace(source, model=model), f"verification takes {format_size(need)} ({dtype} on {where})"
    raise OutputError(
        f"verification loads the model and needs {format_size(_OVERHEAD * size * 2)} of memory, "
        f"{format_size(max(free for _, free, _ in rooms))} are free; free some, or write without it (--no-verify)"
    )


@contextmanager
def explain_export_disk_full(request: ExportRequest, needs: Needs) -> Generator[None, None, None]:
    """A full disk in our words. What was written until then is gone already, nothing stands under the final name."""
    try:
        yield
    except (OSError, SafetensorError, ModelError) as error:
        if not is_disk_full(error) and not is_disk_full_message(
            str(error)
        ):  # a process that was given the writing says it
            raise
        raise OutputError(
            f"{request.folder}: the disk became full while {request.type} was written "
            f"({format_size(needs.disk_bytes)} are needed); nothing is left of it. Free some space, or choose another "
            "disk with -o"
        ) from error
