"""What was trained, ready to answer: a run folder, an adapter folder, or a plain model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lowrank.models.loading as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import CONFIG_FILE, load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_state import STATE_FILE
from lowrank.checkpoints.value_head import FILE as VALUE_HEAD_FILE
from lowrank.checkpoints.value_head import read_value_head
from lowrank.config import resolve
from lowrank.config.read import read_file
from lowrank.data.config import Config as DataConfig
from lowrank.data.rendering import Renderer
from lowrank.errors import DataError, ModelError, did_you_mean
from lowrank.evaluate.reward import rewards
from lowrank.generate.request import Answer, Piece
from lowrank.generate.sampler import Config, Prompt, answer_all
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.base import Base
from lowrank.models.config import Config as ModelConfig
from lowrank.records import BARE_BASE, Conversation, Rated

BARE = "base"
"""How the untouched base is called among the voices."""


@dataclass
class Trained:
    """A base with adapters, by name. `base` is always there and means no adapter."""

    base: Base
    bank: Bank
    renderer: Renderer
    """The base's, and that of every voice without one of its own."""
    slots: dict[str, int] = field(default_factory=lambda: {BARE: BARE_BASE})
    value_heads: dict[str, torch.Tensor] = field(default_factory=dict)
    """(D) of the voices that are reward models."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Where the adapters were loaded from."""
    renderers: dict[str, Renderer] = field(default_factory=dict)
    """Of voices that were trained with chat templates of their own; those with the same settings share one."""

    def slot(self, name: str) -> int:
        """The slot of a voice; ModelError with what there is."""
        if name not in self.slots:
            raise ModelError(f"there is no adapter {name!r} here{did_you_mean(name, self.slots)}")
        return self.slots[name]

    def renderer_of(self, name: str) -> Renderer:
        """How a voice reads a conversation: as in its training."""
        return self.renderers.get(name, self.renderer)

    def rewards(self, conversations: Sequence[tuple[str, Conversation]]) -> list[float]:
        """What each `(reward model, conversation that ends in an answer)` is given; higher is better.

        ModelError for a voice that is no reward model, DataError for a conversation it cannot read whole.
        """
        scored = []
        for name, conversation in conversations:
            slot = self.slot(name)
            if name not in self.value_heads:
                raise ModelError(f"{name!r} is no reward model: there is no {VALUE_HEAD_FILE} beside it")
            rendering = self.renderer_of(name).render(Rated(conversation, desirable=True))
            if rendering.problem or rendering.truncated_tokens:
                raise DataError(rendering.problem or "the conversation is longer than data.max_length")
            scored.append((slot, self.value_heads[name], rendering.segments[0]))
        return rewards(self.base, self.bank, scored)

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """What tells one state of an adapter from another: the digest of its tensors, `base` for the bare base."""
        return {name: _digest(self.bank, self.slot(name)) for name in names}

    def answer(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: Config,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The next answer of each `(voice, conversation)`, in order; `on_text` hears a single one as it comes.

        A voice that gives NaN has an empty answer; `answers` says why.
        """
        found = self.answers(conversations, config, on_text=on_text)
        return [self.base.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in found]

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: Config,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """As `answer`, with tokens and, where there is no answer, the error. Each voice has its own template."""
        prompts = [Prompt(self.renderer_of(name).prompt(each), self.slot(name)) for name, each in conversations]
        virtual = max(self.bank.num_virtual(prompt.slot) for prompt in prompts)
        config = self._within_reach(virtual + max(len(prompt.token_L) for prompt in prompts), config)
        listener = _Text(self.base.tokenizer, on_text) if on_text else None

        def hear(index: int, piece: Piece) -> None:
            if listener is not None and piece.token is not None:
                listener(piece.token)

        by_stop: dict[frozenset[int], list[int]] = {}
        for index, (name, _) in enumerate(conversations):
            by_stop.setdefault(self.renderer_of(name).stop_tokens, []).append(index)
        found: dict[int, Answer] = {}
        for stop_tokens, members in by_stop.items():
            asked = [prompts[index] for index in members]
            answers = answer_all(self.base, self.bank, asked, config, stop_tokens=stop_tokens, on_piece=hear)
            found.update(zip(members, answers))
        return [found[index] for index in range(len(conversations))]

    def _within_reach(self, length: int, config: Config) -> Config:
        """Answers end where the model's positions end; ModelError if the conversation alone goes that far."""
        reach = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None)
        if not reach or length + config.max_new_tokens <= reach:
            return config
        if length >= reach:
            raise ModelError(
                f"the conversation has {length} tokens and the model reads {reach}; ask less at once (/undo, /reset)"
            )
        return config.model_copy(update={"max_new_tokens": reach - length})


def open_trained(
    path: str, *, which: str = "best", chat_template: str | None = None, notify: Callable[[str], None] = print
) -> Trained:
    """Load what `path` names: a run folder (all its jobs), one of its checkpoints, an adapter folder, or a model.

    `which`: a run's `best` or `last` adapters. `chat_template`: a built-in one or a file, instead of the run's or
    the tokenizer's. Raises ModelError, ConfigError.
    """
    keep_freed_memory()
    folder = Path(path)
    data = DataConfig(chat_template=chat_template)
    if is_run(folder):
        return _open_run(folder, which, chat_template, notify)
    if (folder / STATE_FILE).is_file() and is_run(folder.resolve().parent.parent):
        return _open_run(folder.resolve().parent.parent, which, chat_template, notify, checkpoint=folder)
    if (current(folder) / CONFIG_FILE).is_file():
        return _open_adapter(folder, data, notify)
    return _open_model(ModelConfig(path=path), data, notify)


def is_run(folder: Path) -> bool:
    """A model's folder has a config.json too; a run's names its model and where it is."""
    try:
        content = json.loads((folder / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"model", "output_dir"}


def _open_model(model: ModelConfig, data: DataConfig, notify: Callable[[str], None]) -> Trained:
    tokenizer = loading.load_tokenizer(model)
    base = loading.load(model, tokenizer=tokenizer, notify=notify)
    return Trained(base, Bank(base), Renderer(tokenizer, data))


def _open_adapter(folder: Path, data: DataConfig, notify: Callable[[str], None]) -> Trained:
    saved = load_adapter(folder)
    if not saved.base_name:
        raise ModelError(f"{folder / CONFIG_FILE} does not name its base model (base_model_name_or_path)")
    trained = _open_model(ModelConfig(path=saved.base_name, revision=saved.revision), data, notify)
    _attach(trained, folder.name, folder)
    return trained


def _open_run(
    folder: Path,
    which: str,
    chat_template: str | None,
    notify: Callable[[str], None],
    checkpoint: Path | None = None,
) -> Trained:
    """`checkpoint`: its adapters instead of the jobs' best or last."""
    # Without a folder: what it was trained on need not be there any more, nor be looked for.
    config = resolve(read_file(folder / RUN_CONFIG), source=str(folder / RUN_CONFIG))
    first = config.jobs[0]
    settings = {job.name: _with_template(job.data, chat_template) for job in config.jobs}
    data = settings[first.name]
    if checkpoint is not None and first.trains_base:
        raise ModelError(
            f"{checkpoint}: a checkpoint of tuning: {first.tuning} is no model by itself; give the run folder"
        )
    if checkpoint is not None:
        found = {job.name: _in_checkpoint(checkpoint / job.name) for job in config.jobs}
    else:
        found = {job.name: find_trained(folder / job.name, which, first.trains_base) for job in config.jobs}
    missing = [name for name, path in found.items() if path is None]
    if len(missing) == len(found):
        what = "model" if first.trains_base else "adapter"
        raise ModelError(
            f"{folder} holds no trained {what} yet; one is written at a job's first evaluation or at its end. "
            "Go on with resume=true, or give the base itself"
        )
    if missing:
        notify(f"no adapter yet: {', '.join(missing)}")
    for name, path in found.items():
        if path is not None and path.name != which and checkpoint is None:
            notify(f"{name} has no {which} yet, this is its {path.name}")
    if first.trains_base:
        model = config.model.model_copy(update={"path": str(current(found[first.name] or folder)), "revision": None})
        trained = _open_model(model, data, notify)
        trained.slots = {first.name: BARE_BASE}  # the base itself was trained: there is no untouched one here
        _attach_value_head(trained, first.name, found[first.name] or folder)
        return trained
    trained = _open_model(where_it_is_now(config.model, found.values()), data, notify)
    renderers = {_reading(data): trained.renderer}
    for name, path in found.items():
        if path is not None:
            _attach(trained, name, path)
            own = settings[name]
            trained.renderers[name] = renderers.setdefault(_reading(own), Renderer(trained.base.tokenizer, own))
    return trained


def _with_template(data: DataConfig, chat_template: str | None) -> DataConfig:
    return data.model_copy(update={"chat_template": chat_template}) if chat_template else data


def _reading(data: DataConfig) -> str:
    """Settings that decide how a conversation is read; jobs with the same ones share a renderer."""
    return data.model_dump_json(exclude={"train", "eval"})


def _in_checkpoint(folder: Path) -> Path | None:
    return folder if (folder / CONFIG_FILE).is_file() else None


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


def _attach(trained: Trained, name: str, folder: Path) -> None:
    saved = load_adapter(folder)
    slot = trained.bank.add(saved.config, seed=0)
    trained.bank.load(slot, saved.tensors)
    trained.slots[name] = slot
    trained.folders[name] = folder
    _attach_value_head(trained, name, folder)


def _attach_value_head(trained: Trained, name: str, folder: Path) -> None:
    value_D = read_value_head(folder)
    if value_D is not None:
        trained.value_heads[name] = value_D


def _digest(bank: Bank, slot: int) -> str:
    if slot == BARE_BASE:
        return BARE
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(bank.parameters(slot).items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


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
