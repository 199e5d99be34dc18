"""What was trained, in the forms the user runs; each is read back and compared with what was trained.

check all targets -> ask base + adapter -> write -> read back -> compare -> export.json, README.md
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from lowrank import __version__
from lowrank.checkpoints.atomic import new_folder, write_text
from lowrank.errors import LowrankError, ModelError, OutputError, raise_all
from lowrank.export import Needs, Target
from lowrank.export.card import card
from lowrank.export.readers import read_adapter
from lowrank.export.sizes import said_size
from lowrank.export.source import Source
from lowrank.export.targets import TargetConfig
from lowrank.export.verify import STORE_BYTES, Answers, Comparer, Comparison, ask_reference
from lowrank.models.checkpoint_files import Checkpoint
from lowrank.to_take_home import Found

REPORT = "export.json"
_SAID_FULL = re.compile(r"No space left on device|os error (28|112|122)\b|Disk quota exceeded")
"""By safetensors' own writer, and by processes that were given the writing."""
_OVERHEAD = 1.2
"""Memory of a loaded model over its weights: activations, caches, the adapter."""

Watch = Callable[[str, int, int], None]
"""`(what is being done, done, total)`."""


@dataclass(frozen=True)
class Order:
    """A target and where it goes."""

    config: TargetConfig
    folder: Path

    @property
    def type(self) -> str:
        """The target's name."""
        return self.config.type


def order(targets: Sequence[TargetConfig], folder: Path) -> list[Order]:
    """One target goes to `folder`, several each to a folder in it named after the target."""
    if len(targets) == 1:
        return [Order(targets[0], folder)]
    return [Order(target, folder / target.type) for target in targets]


def take_home(
    found: Found,
    orders: Sequence[Order],
    *,
    verify: bool = True,
    prompts: str | None = None,
    dry_run: bool = False,
    notify: Callable[[str], None] = print,
    watch: Watch = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write every target; what stands in their export.json, by target.

    Everything that can be known beforehand is checked before anything is written. `prompts`: a file of rows to compare
    on, instead of the run's held-out ones. A target that differs from what was trained has `passed: false`; it is kept.
    `dry_run` stops after the checks. Raises ModelError, OutputError, DataError.
    """
    source = found.source
    _refuse_places(orders, found)
    built = [(each, each.config.build()) for each in orders]
    needs = _needs(built, source)
    if verify:
        source, said = _where_to_verify(source)
        notify(said)
    _check_room(orders, needs)
    for each in orders:
        notify(f"{each.type}: {said_size(needs[each.type].disk_bytes)} on disk, "
               f"{said_size(needs[each.type].memory_bytes)} of memory, into {each.folder}")  # fmt: skip
        for note in needs[each.type].notes:
            notify(f"{each.type}: {note}")
    installs = [install for each in orders for install in needs[each.type].installs]
    for install in installs:
        notify(install.said)
    result: dict[str, Any] = {"source": source.name, "base": source.model.path, "targets": {}, "passed": True}
    if dry_run:
        for each in orders:
            own = needs[each.type]
            result["targets"][each.type] = {
                "path": str(each.folder), "disk_bytes": own.disk_bytes, "memory_bytes": own.memory_bytes,
                "notes": list(own.notes),
            }  # fmt: skip
        return result
    for install in installs:
        install.make()
    answers = _ask(found, source, prompts, notify, watch) if verify else None
    comparer = None if answers is None else Comparer(answers, source.stop_tokens)
    for each, target in built:
        told = _export(each, target, source, needs[each.type], comparer, watch)
        result["targets"][each.type] = told
        result["passed"] = result["passed"] and told["passed"] is not False
        notify(
            f"{each.type}: written in {told['seconds']:.0f} s, {said_size(told['bytes'])}; {_verdict(told['passed'])}"
        )
    return result


def _verdict(passed: bool | None) -> str:
    """In words."""
    return {True: "read back, it is the same model", False: "read back, it differs", None: "not compared"}[passed]


def _export(
    own: Order, target: Target, source: Source, needs: Needs, comparer: Comparer | None, watch: Watch
) -> dict[str, Any]:
    """Write one target, compare it, and say so beside it."""
    started = time.monotonic()
    with disk_full(own, needs), new_folder(own.folder) as partial:
        written = target.write(source, partial, lambda done, total, what="": watch(f"writing {own.type}", done, total))
    seconds = time.monotonic() - started
    comparisons: list[Comparison] = []
    read_backs = target.read_back(source, own.folder)
    try:
        for read_back in read_backs if comparer else ():
            what = f"comparing {read_back.name}"
            assert comparer is not None
            comparisons.append(comparer.compare(read_back, lambda a, b, what=what: watch(what, a, b)))
    finally:
        for path in {path for read_back in read_backs for path in read_back.temporary}:
            path.unlink(missing_ok=True)
    notes = [*needs.notes, *written]
    if not comparisons:
        notes.append("unverified: what was written was not compared with what was trained")
    answers = None if comparer is None else comparer.answers
    report = {
        "target": own.config.model_dump(mode="json"),
        "path": str(own.folder),
        "source": source.name,
        "base": source.model.path,
        "notes": notes,
        "said": list(written),
        "seconds": round(seconds, 3),
        "bytes": sum(path.stat().st_size for path in own.folder.rglob("*") if path.is_file()),
        "passed": all(each.passed for each in comparisons) if answers else None,
        "compared_on": answers.held_out.origin if answers else None,
        "compared_in": f"{source.model.dtype} on {source.model.device}" if answers else None,
        "comparisons": [each.to_json() for each in comparisons],
        "lowrank": __version__,
    }
    write_text(own.folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    usage = target.usage(source, "path/of/this/folder")
    write_text(own.folder / "README.md", card(source, own.type, usage, comparisons, notes))
    return report


def _ask(found: Found, source: Source, prompts: str | None, notify: Callable[[str], None], watch: Watch) -> Answers:
    """What base + adapter says, kept for all targets."""
    held_out = found.held_out(prompts)
    notify(f"compared on {held_out.origin}")
    watch("asking base + adapter", 0, 1)
    with read_adapter(source, source.adapter) as reader:
        vocabulary = reader.bank.head(reader.slot).weight_VD.shape[0]
        return ask_reference(
            reader, held_out, source.stop_tokens, vocabulary, lambda a, b: watch("asking base + adapter", a, b)
        )


def _refuse_places(orders: Sequence[Order], found: Found) -> None:
    """Nothing is written over, and nothing into what it is made of."""
    problems = []
    for each in orders:
        if each.folder.exists() and not each.folder.is_dir():
            problems.append(f"{each.folder} is a file")
        elif each.folder.is_dir() and any(each.folder.iterdir()):
            problems.append(f"{each.folder} is not empty; choose another folder with -o, or empty it yourself")
        inside = each.folder.resolve()
        for origin in {found.folder.resolve(), found.source.base.resolve()}:
            if origin.is_dir() and (inside == origin or origin in inside.parents):
                problems.append(f"{each.folder} is inside of what is exported ({origin}); choose a folder outside")
    raise_all(OutputError, "an export cannot go there", problems)


def _needs(built: Sequence[tuple[Order, Target]], source: Source) -> dict[str, Needs]:
    """What each target takes; the troubles of all of them at once."""
    needs, troubles = {}, []
    for own, target in built:
        try:
            needs[own.type] = target.needs(source)
        except LowrankError as error:
            troubles.append((own.type, error))
    if len(troubles) == 1:
        raise troubles[0][1]
    if troubles:
        raise_all(
            type(troubles[0][1]), "these targets cannot be written", [f"{name}: {error}" for name, error in troubles]
        )
    return needs


def _check_room(orders: Sequence[Order], needs: dict[str, Needs]) -> None:
    """Enough disk for all targets together, enough memory for each."""
    wanted: dict[Path, int] = {}
    for each in orders:
        parent = next(path for path in (each.folder, *each.folder.resolve().parents) if path.exists())
        wanted[parent] = wanted.get(parent, 0) + needs[each.type].disk_bytes
    problems = []
    for parent, size in wanted.items():
        free = shutil.disk_usage(parent).free
        if size > free:
            problems.append(f"{said_size(size)} of disk are needed in {parent}, {said_size(free)} are free")
    memory = psutil.virtual_memory().available
    for each in orders:
        if needs[each.type].memory_bytes > memory:
            size = said_size(needs[each.type].memory_bytes)
            problems.append(f"{each.type} needs {size} of memory, {said_size(memory)} are free")
    raise_all(OutputError, "there is not enough room", problems)


def _where_to_verify(source: Source) -> tuple[Source, str]:
    """Float32 where it fits, else 16 bits; the GPU if it fits there, else the processor."""
    size = sum(torch.Size(entry.shape).numel() for entry in Checkpoint(source.base).values())
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
                return replace(source, model=model), f"verification takes {said_size(need)} ({dtype} on {where})"
    raise OutputError(
        f"verification loads the model and needs {said_size(_OVERHEAD * size * 2)} of memory, "
        f"{said_size(max(free for _, free, _ in rooms))} are free; free some, or write without it (--no-verify)"
    )


@contextmanager
def disk_full(own: Order, needs: Needs) -> Any:
    """A full disk in our words. What was written until then is gone already, nothing stands under the final name."""
    try:
        yield
    except (OSError, SafetensorError, ModelError) as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not _SAID_FULL.search(str(error)):
            raise
        raise OutputError(
            f"{own.folder}: the disk became full while {own.type} was written ({said_size(needs.disk_bytes)} are "
            "needed); nothing is left of it. Free some space, or choose another disk with -o"
        ) from error
