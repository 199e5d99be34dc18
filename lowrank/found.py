"""What a path names (a run, one of its checkpoints, an adapter, a model), before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import CONFIG_FILE, load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_state import STATE_FILE
from lowrank.config import resolve
from lowrank.config.read import read_file
from lowrank.data.config import Config as DataConfig
from lowrank.errors import ModelError
from lowrank.models.config import Config as ModelConfig


@dataclass(frozen=True)
class Found:
    """A model, and adapters on it.

    data            how the base reads a conversation
    adapters        folders, by name
    data_of         how adapters read one, where that is as in their own training
    trained_base    of a run that tuned the base itself: the job's name and the folder; there is no untouched base
    """

    model: ModelConfig
    data: DataConfig
    adapters: Mapping[str, Path] = field(default_factory=dict)
    data_of: Mapping[str, DataConfig] = field(default_factory=dict)
    trained_base: tuple[str, Path] | None = None


def find(
    path: str, *, which: str = "best", chat_template: str | None = None, notify: Callable[[str], None] = print
) -> Found:
    """`which`: a run's `best` or `last` adapters. `chat_template`: a built-in one or a file, instead of the run's or
    the tokenizer's. `notify` hears what is not there. Raises ModelError, ConfigError.
    """
    folder = Path(path)
    if is_run(folder):
        return _find_in_run(folder, which, chat_template, notify)
    if (folder / STATE_FILE).is_file() and is_run(folder.resolve().parent.parent):
        return _find_in_run(folder.resolve().parent.parent, which, chat_template, notify, checkpoint=folder)
    data = DataConfig(chat_template=chat_template)
    if not (current(folder) / CONFIG_FILE).is_file():
        return Found(ModelConfig(path=path), data)
    saved = load_adapter(folder)
    if not saved.base_name:
        raise ModelError(f"{folder / CONFIG_FILE} does not name its base model (base_model_name_or_path)")
    return Found(ModelConfig(path=saved.base_name, revision=saved.revision), data, {folder.name: folder})


def is_run(folder: Path) -> bool:
    """A model's folder has a config.json too; a run's names its model and where it is."""
    try:
        content = json.loads((folder / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"model", "output_dir"}


def where_it_is_now(model: ModelConfig, adapters: Iterable[Path | None]) -> ModelConfig:
    """A run may have named its base from another current directory; its adapters name it in full."""
    if not Path(model.path).exists():
        for adapter in adapters:
            base = load_adapter(adapter).base_name if adapter else None
            if base and Path(base).is_dir():
                return model.model_copy(update={"path": base})
    return model


def find_trained(folder: Path, which: str, whole_model: bool) -> Path | None:
    """A job's `best` or `last`, whichever is asked for, else the other."""
    file = "config.json" if whole_model else CONFIG_FILE
    return next((folder / name for name in (which, "best", "last") if (current(folder / name) / file).is_file()), None)


def _find_in_run(
    folder: Path,
    which: str,
    chat_template: str | None,
    notify: Callable[[str], None],
    checkpoint: Path | None = None,
) -> Found:
    """`checkpoint`: its adapters instead of the jobs' best or last."""
    # Without a folder: what it was trained on need not be there any more, nor be looked for.
    config = resolve(read_file(folder / RUN_CONFIG), source=str(folder / RUN_CONFIG))
    first = config.jobs[0]
    settings = {job.name: _with_template(job.data, chat_template) for job in config.jobs}
    if checkpoint is not None and first.trains_base:
        raise ModelError(
            f"{checkpoint}: a checkpoint of tuning: {first.tuning} is no model by itself; give the run folder"
        )
    if checkpoint is not None:
        found = {job.name: _in_checkpoint(checkpoint / job.name) for job in config.jobs}
    else:
        found = {job.name: find_trained(folder / job.name, which, first.trains_base) for job in config.jobs}
    there = {name: path for name, path in found.items() if path is not None}
    if not there:
        what = "model" if first.trains_base else "adapter"
        raise ModelError(
            f"{folder} holds no trained {what} yet; one is written at a job's first evaluation or at its end. "
            "Go on with resume=true, or give the base itself"
        )
    missing = [name for name in found if name not in there]
    if missing:
        notify(f"no adapter yet: {', '.join(missing)}")
    for name, path in there.items():
        if path.name != which and checkpoint is None:
            notify(f"{name} has no {which} yet, this is its {path.name}")
    data = settings[first.name]
    if first.trains_base:
        place = there[first.name]
        model = config.model.model_copy(update={"path": str(current(place)), "revision": None})
        return Found(model, data, trained_base=(first.name, place))
    return Found(where_it_is_now(config.model, there.values()), data, there, settings)


def _with_template(data: DataConfig, chat_template: str | None) -> DataConfig:
    return data.model_copy(update={"chat_template": chat_template}) if chat_template else data


def _in_checkpoint(folder: Path) -> Path | None:
    return folder if (folder / CONFIG_FILE).is_file() else None
