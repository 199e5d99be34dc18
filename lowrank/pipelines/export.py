"""Export: what was trained in the forms the user runs; each is read back and compared with what was trained.

check all targets -> ask base + adapter -> write -> read back -> compare -> export.json, README.md
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lowrank import __version__
from lowrank.checkpoints.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from lowrank.checkpoints.atomic import new_folder, write_text
from lowrank.checkpoints.model_card import reward_code
from lowrank.checkpoints.value_head import FILE as VALUE_HEAD
from lowrank.checkpoints.value_head import write_value_head
from lowrank.data.config import SourceConfig
from lowrank.errors import LowrankError
from lowrank.export import ExportTarget, ReadBack, WritesParts
from lowrank.export.gguf.llama_cpp import OtherVersionError
from lowrank.export.publish.model_card import card
from lowrank.export.source import Source
from lowrank.export.verify.compare import Comparer, Comparison, ReferenceLogprobs, reference_answers
from lowrank.export.verify.images import ImageAnswer, compare_images, reference_image_answer
from lowrank.export.verify.readers import NO_TOWER, read_adapter
from lowrank.export.writing.sizes import format_size
from lowrank.notices import log_notice
from lowrank.pipelines.export_checks import (
    CheckedTarget,
    ExportRequest,
    check_room,
    checked_targets,
    explain_export_disk_full,
    where_to_verify,
)
from lowrank.pipelines.export_source import ResolvedSource
from lowrank.pipelines.target_failures import TargetFailures, error_as_json

REPORT = "export.json"

ExportProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""


def export_targets(
    found: ResolvedSource,
    requests: Sequence[ExportRequest],
    *,
    verify: bool = True,
    prompts: SourceConfig | None = None,
    dry_run: bool = False,
    notify: Callable[[str], None] = log_notice,
    on_progress: ExportProgressCallback = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write every target; what stands in their export.json, by target.

    Everything that can be known beforehand is checked before anything is written. `prompts`: rows to compare
    on, instead of the run's held-out ones. A target that differs from what was trained has `passed: false`; it is kept.
    One of several that fails keeps no other from being written: it has `passed: false` and an `error`. `dry_run` stops
    after the checks. Raises ModelError, OutputError, DataError: what concerns all targets, or the failure of every one.
    """
    source = found.source
    failures = TargetFailures([each.type for each in requests], notify)
    built = checked_targets(requests, found, failures)
    if verify:
        source, notice = where_to_verify(source)
        notify(notice)
    check_room(built, failures)
    failures.raise_if_none_is_left()
    built = [each for each in built if each.request.type not in failures.errors]
    _announce(built, notify)
    result: dict[str, Any] = {"source": source.name, "base": source.model.path, "targets": {}, "passed": True}
    if not dry_run:
        for each in built:
            with failures.of(each.request.type):
                for install in each.needs.installs:
                    install.make()
        built = [each for each in built if each.request.type not in failures.errors]
        failures.raise_if_none_is_left()
        answers, image_answer = None, None
        if verify:
            answers, image_answer = _reference_answers(found, source, prompts, notify, on_progress)
        comparer = None if answers is None else Comparer(answers, source.stop_tokens)
        for each in built:
            with failures.of(each.request.type):
                reported = _export_target(each, source, comparer, image_answer, on_progress)
                result["targets"][each.request.type] = reported
                notify(
                    f"{each.request.type}: written in {reported['seconds']:.0f} s, {format_size(reported['bytes'])}; "
                    f"{_verdict(reported['passed'])}"
                )
        failures.raise_if_none_is_left()
    else:
        for each in built:
            result["targets"][each.request.type] = {
                "path": str(each.request.folder), "disk_bytes": each.needs.disk_bytes,
                "memory_bytes": each.needs.memory_bytes, "notes": list(each.needs.notes),
            }  # fmt: skip
    for each in requests:
        if each.type in failures.errors:
            result["targets"][each.type] = {
                "target": each.config.model_dump(mode="json"), "path": str(each.folder), "passed": False,
                "error": failures.to_json(each.type),
            }  # fmt: skip
    result["targets"] = {each.type: result["targets"][each.type] for each in requests}
    result["passed"] = all(each.get("passed") is not False for each in result["targets"].values())
    return result


def _announce(built: Sequence[CheckedTarget], notify: Callable[[str], None]) -> None:
    """What each target takes and where it goes, and what is fetched for it."""
    for each in built:
        notify(f"{each.request.type}: {format_size(each.needs.disk_bytes)} on disk, "
               f"{format_size(each.needs.memory_bytes)} of memory, into {each.request.folder}")  # fmt: skip
        for note in each.needs.notes:
            notify(f"{each.request.type}: {note}")
    for each in built:
        for install in each.needs.installs:
            notify(install.description)


def _verdict(passed: bool | None) -> str:
    """In words."""
    return {True: "read back, it is the same model", False: "read back, it differs", None: "not compared"}[passed]


def _export_target(
    checked: CheckedTarget,
    source: Source,
    comparer: Comparer | None,
    image_answer: ImageAnswer | str | None,
    on_progress: ExportProgressCallback,
) -> dict[str, Any]:
    """Write one target, compare it, and say so beside it."""
    request, target, needs = checked.request, checked.target, checked.needs
    started = time.monotonic()
    with explain_export_disk_full(request, needs), new_folder(request.folder) as partial:
        written = target.write(
            source, partial, lambda done, total, what="": on_progress(f"writing {request.type}", done, total)
        )
        written = (*written, *_bring_value_head(source, partial))
    seconds = time.monotonic() - started
    failed = dict(target.failures) if isinstance(target, WritesParts) else {}
    comparisons: list[Comparison] = []
    uncompared: list[str] = []
    read_backs = target.read_back(source, request.folder)
    try:
        for read_back in read_backs if comparer else ():
            assert comparer is not None
            try:
                for found in _compared(read_back, comparer, image_answer, on_progress):
                    if isinstance(found, str):
                        uncompared.append(found)
                    else:
                        comparisons.append(found)
            except LowrankError as error:
                if not read_back.compares_text and isinstance(error, OtherVersionError):
                    uncompared.append(f"{read_back.name} was not compared with a picture: {error}")
                elif len(read_backs) == 1 and not comparisons:
                    raise
                else:
                    failed[read_back.name] = error
    finally:
        for path in {path for read_back in read_backs for path in read_back.temporary}:
            path.unlink(missing_ok=True)
    notes = [*needs.notes, *written, *uncompared]
    if not comparisons:
        notes.append("unverified: what was written was not compared with what was trained")
    answers = None if comparer is None else comparer.answers
    report = {
        "target": request.config.model_dump(mode="json"),
        "path": str(request.folder),
        "source": source.name,
        "base": source.model.path,
        "notes": notes,
        "written": list(written),
        "seconds": round(seconds, 3),
        "bytes": sum(path.stat().st_size for path in request.folder.rglob("*") if path.is_file()),
        "passed": False if failed else all(each.passed for each in comparisons) if answers else None,
        "failed": {name: error_as_json(error) for name, error in failed.items()},
        "compared_on": answers.held_out.origin if answers else None,
        "compared_in": f"{source.model.dtype} on {source.model.device}" if answers else None,
        "comparisons": [each.to_json() for each in comparisons],
        "lowrank": __version__,
    }
    write_text(request.folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    usage = _usage(target, source, request.folder)
    write_text(request.folder / "README.md", card(source, request.type, usage, comparisons, notes))
    return report


def _usage(target: ExportTarget, source: Source, folder: Path) -> str:
    """How it is run, for its README.md; of a reward model that has its value head, how it judges."""
    path = "path/of/this/folder"
    if not source.is_reward_model or not (folder / VALUE_HEAD).is_file():
        return target.usage(source, path)
    what = "It is a reward model: it judges answers, and writes none worth reading."
    return f"{what}\n\n```python\n{reward_code(path)}\n```"


def _bring_value_head(source: Source, folder: Path) -> tuple[str, ...]:
    """The value head beside what was written, and what a person should know of it.

    A critic goes with its adapter alone, for training to go on: programs that load every safetensors file of a model
    know no such tensor. A reward model is nothing without it.
    """
    if source.value_head is None or not (source.is_reward_model or (folder / ADAPTER_CONFIG).is_file()):
        return ()
    if not any(folder.glob("*.safetensors")):
        return (f"a reward model without its value head, which this form cannot hold: it gives no rewards; "
                f"peft and merged bring {VALUE_HEAD}",)  # fmt: skip
    write_value_head(folder, source.value_head, critic=not source.is_reward_model)
    what = "what gives an answer its reward" if source.is_reward_model else "PPO's critic, for training to go on with"
    return (f"{VALUE_HEAD}: {what}",)


def _compared(
    read_back: ReadBack, comparer: Comparer, image_answer: ImageAnswer | str | None, on_progress: ExportProgressCallback
) -> Iterator[Comparison | str]:
    """What was written, opened once and asked all there is to ask; in words what it could not be asked."""
    what = f"comparing {read_back.name}"
    skip_note = f"{read_back.name} was not compared with a picture: {image_answer}"
    if not read_back.compares_text and not isinstance(image_answer, ImageAnswer):
        yield skip_note
        return
    comparer.prepare(read_back)
    with read_back.open() as reader:
        if read_back.compares_text:
            yield comparer.compare(read_back, reader, lambda a, b: on_progress(what, a, b))
        if read_back.compares_images and isinstance(image_answer, ImageAnswer):
            on_progress(what, 0, 1)
            yield compare_images(read_back, reader, image_answer)
        elif read_back.compares_images:
            yield skip_note


def _reference_answers(
    found: ResolvedSource,
    source: Source,
    prompts: SourceConfig | None,
    notify: Callable[[str], None],
    on_progress: ExportProgressCallback,
) -> tuple[ReferenceLogprobs, ImageAnswer | str]:
    """What base + adapter says, kept for all targets; of a base that takes pictures also of one, or why it cannot be
    asked about one."""
    held_out = found.held_out(prompts)
    notify(f"compared on {held_out.origin}")
    on_progress("asking base + adapter", 0, 1)
    with read_adapter(source, source.adapter) as reader:
        vocabulary = reader.bank.head(reader.slot).weight_VD.shape[0]
        answers = reference_answers(
            reader, held_out, source.stop_tokens, vocabulary, lambda a, b: on_progress("asking base + adapter", a, b)
        )
        if not source.supports_images:
            return answers, NO_TOWER
        try:
            return answers, reference_image_answer(reader, found.renderer, source.stop_tokens)
        except LowrankError as error:
            return answers, str(error)
