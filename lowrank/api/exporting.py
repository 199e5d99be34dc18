"""`lowrank.export`: a run, an adapter or a model in the forms that other programs run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lowrank.api.settings import one_source
from lowrank.data.config import SourceConfig
from lowrank.data.sources.memory import RowsLike
from lowrank.errors import ConfigError, NotTheSameError, OutputError, raise_all
from lowrank.export.merge.combine import CombineConfig
from lowrank.export.targets import TargetConfig
from lowrank.notices import LOGGER, log_notice
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import export_requests
from lowrank.pipelines.export_source import open_source
from lowrank.setting_problems import settings_of
from lowrank.settings import Settings
from lowrank.third_party import code_allowed, objects_given

TargetLike = str | Mapping[str, Any] | Settings
"""A target's name, its settings as a dict with `type`, or as an object."""


def export(
    path: str | Path,
    to: TargetLike | Sequence[TargetLike] = "merged",
    output: str | Path | None = None,
    *,
    adapters: str | Sequence[str] = (),
    which: Literal["best", "last"] = "best",
    combine: Mapping[str, Any] | CombineConfig | None = None,
    chat_template: str | None = None,
    base: str | None = None,
    prompts: RowsLike | str | SourceConfig | None = None,
    verify: bool = True,
    dry_run: bool = False,
    strict: bool = True,
    notify: Callable[[str], None] | None = None,
    allow_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write what `path` names (a run, an adapter, a model) as other programs run it, read it back and compare.

        lowrank.export("runs/a", "merged", "merged-model", dtype="float16")
        lowrank.export("runs/a", ["peft", {"type": "gguf", "types": ["q8_0"]}], "for-others")

    to         targets: `peft`, `merged`, `gguf`, `awq` ... (docs/export.md); settings of a single one as keywords
    output     where to; of several, each to a folder in it. Left out: beside the run, `RUN-export/NAME-TARGET`
    adapters   a job of the run (left out: that of the lowest held-out loss; ModelError where jobs of different
               objectives do not compare), or more adapter folders; several become one, by `combine`
    combine    how: `{"method": "ties", "weights": [0.7, 0.3]}`
    prompts    rows to compare on, or a file of them, instead of the run's held-out ones
    which      a job's adapter at its best held-out loss, or at its end (`last`)
    base       where the base is now, if its folder has moved
    chat_template  a built-in one or a .jinja file, instead of the run's
    verify     False: do not read back and compare
    dry_run    say what would be written, and write nothing
    notify     receives each line about the progress; left out: the logger `lowrank`
    allow_code the model's own code, or an adapter's, may run
    strict     NotTheSameError where what was written differs by more than it may; it is kept

    Returns what stands in the targets' export.json, `{"passed": ..., "targets": {name: {"path": ..., "comparisons":
    ...}}}`. Raises ModelError, OutputError, DataError, ConfigError before anything is written wherever that can be
    known.
    """
    report = notify or log_notice
    targets = [_target(each, settings) for each in ([to] if isinstance(to, (str, Mapping, Settings)) else to)]
    objects: dict[str, Any] = {}
    compared = None if prompts is None else one_source(prompts, "export: prompts", objects)
    if settings and len(targets) > 1:
        raise ConfigError("export: of several targets, each has its own settings: {'type': 'gguf', 'types': ['q8_0']}")
    with code_allowed(allow_code), objects_given(objects):
        found = open_source(
            str(path),
            adapters=[adapters] if isinstance(adapters, str) else list(adapters),
            which=which,
            combination=_combination(combine),
            chat_template=chat_template,
            base=base,
            notify=report,
        )
        folder = Path(output) if output is not None else found.default_place([each.type for each in targets])
        requests = export_requests(targets, folder)
        result = export_targets(
            found, requests, verify=verify, prompts=compared, dry_run=dry_run, notify=notify or LOGGER.info
        )
    errors = {name: each["error"]["message"] for name, each in result["targets"].items() if "error" in each}
    for name, each in result["targets"].items():
        errors |= {f"{name}, {part}": error["message"] for part, error in each.get("failed", {}).items()}
    if strict:
        raise_all(OutputError, "not all that was asked for could be written:", [f"{a}: {b}" for a, b in errors.items()])
    if strict and not result["passed"]:
        raise NotTheSameError(
            f"what was written to {folder} differs from what was trained by more than it may; it is kept, with the "
            f"numbers in export.json: {'; '.join(_differences(result))}"
        )
    return result


def _differences(result: Mapping[str, Any]) -> list[str]:
    """What each comparison that failed says, by target."""
    return [
        f"{name}: {problem}"
        for name, each in result["targets"].items()
        for comparison in each.get("comparisons", ())
        for problem in comparison["problems"]
    ]


def _combination(combine: Mapping[str, Any] | CombineConfig | None) -> CombineConfig | None:
    if not isinstance(combine, Mapping):
        return combine
    return settings_of(CombineConfig, combine, "export: combine cannot be used:")


def _target(target: TargetLike, settings: Mapping[str, Any]) -> TargetConfig:
    if isinstance(target, Settings):
        return target  # type: ignore[return-value]  # a target's
    values = {"type": target, **settings} if isinstance(target, str) else {**target, **settings}
    heading = f"export: these settings of the target {values.get('type')} cannot be used:"
    return settings_of(TargetConfig, values, heading)
