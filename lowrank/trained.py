"""What was trained, ready to answer: a run folder, an adapter folder, or a plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowrank.models.loading as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import CONFIG_FILE, load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.config import load
from lowrank.data.config import Config as DataConfig
from lowrank.data.rendering import Renderer
from lowrank.errors import ModelError, did_you_mean
from lowrank.generate.sampler import Config, Prompt, generate
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.base import Base
from lowrank.models.config import Config as ModelConfig
from lowrank.records import BARE_BASE, Conversation

BARE = "base"
"""How the untouched base is called among the voices."""


@dataclass
class Trained:
    """A base with adapters, by name. `base` is always there and means no adapter."""

    base: Base
    bank: Bank
    renderer: Renderer
    slots: dict[str, int] = field(default_factory=lambda: {BARE: BARE_BASE})

    def slot(self, name: str) -> int:
        """The slot of a voice; ModelError with what there is."""
        if name not in self.slots:
            raise ModelError(f"there is no adapter {name!r} here{did_you_mean(name, self.slots)}")
        return self.slots[name]

    def answer(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: Config,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The next answer of each `(voice, conversation)`, in order; `on_text` hears a single one as it comes."""
        prompts = [Prompt(self.renderer.prompt(each), self.slot(name)) for name, each in conversations]
        listener = _Text(self.base.tokenizer, on_text) if on_text else None
        tokens = generate(
            self.base, self.bank, prompts, config, stop_tokens=self.renderer.stop_tokens, on_token=listener
        )
        return [self.base.tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]


def open_trained(path: str, *, which: str = "best", notify: Callable[[str], None] = print) -> Trained:
    """Load what `path` names: a run folder (all its jobs), an adapter folder, or a model.

    `which`: a run's `best` or `last` adapters. Raises ModelError, ConfigError.
    """
    keep_freed_memory()
    folder = Path(path)
    if (folder / RUN_CONFIG).is_file():
        return _open_run(folder, which, notify)
    if (current(folder) / CONFIG_FILE).is_file():
        return _open_adapter(folder, notify)
    return _open_model(ModelConfig(path=path), DataConfig(), notify)


def _open_model(model: ModelConfig, data: DataConfig, notify: Callable[[str], None]) -> Trained:
    tokenizer = loading.load_tokenizer(model)
    base = loading.load(model, tokenizer=tokenizer, notify=notify)
    return Trained(base, Bank(base, model.storage), Renderer(tokenizer, data))


def _open_adapter(folder: Path, notify: Callable[[str], None]) -> Trained:
    saved = load_adapter(folder)
    if not saved.base_name:
        raise ModelError(f"{folder / CONFIG_FILE} does not name its base model (base_model_name_or_path)")
    trained = _open_model(ModelConfig(path=saved.base_name, revision=saved.revision), DataConfig(), notify)
    _attach(trained, folder.name, folder)
    return trained


def _open_run(folder: Path, which: str, notify: Callable[[str], None]) -> Trained:
    config = load(folder / RUN_CONFIG)
    first = config.jobs[0]
    if first.tuning == "full":
        model = ModelConfig(path=str(current(folder / first.name / which)))
        return _open_model(model, first.data, notify)
    trained = _open_model(config.model, first.data, notify)
    missing = [job.name for job in config.jobs if not _find(folder, job.name, which)]
    for job in config.jobs:
        found = _find(folder, job.name, which)
        if found:
            _attach(trained, job.name, found)
    if len(missing) == len(config.jobs):
        raise ModelError(f"{folder}: no job has an adapter yet; train it first")
    if missing:
        notify(f"no adapter yet: {', '.join(missing)}")
    return trained


def _find(folder: Path, job: str, which: str) -> Path | None:
    """`<job>/<which>`, else the job's other adapter."""
    for name in (which, "best", "last"):
        path = folder / job / name
        if (current(path) / CONFIG_FILE).is_file():
            return path
    return None


def _attach(trained: Trained, name: str, folder: Path) -> None:
    saved = load_adapter(folder)
    slot = trained.bank.add(saved.config, seed=0)
    trained.bank.load(slot, saved.tensors)
    trained.slots[name] = slot


class _Text:
    """Turns tokens into text as they come, holding back half characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text
