"""What was trained, ready to answer: a run folder, an adapter folder, or a plain model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lowrank.models.loading as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.checkpoints.value_head import FILE as VALUE_HEAD_FILE
from lowrank.checkpoints.value_head import read_value_head
from lowrank.data.rendering import Renderer
from lowrank.errors import DataError, ModelError, did_you_mean
from lowrank.evaluate.reward import rewards
from lowrank.found import Found, find
from lowrank.generate.request import Answer, Piece
from lowrank.generate.sampler import Config, Prompt, answer_all
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.base import Base
from lowrank.records import BARE_BASE, Conversation, Rated

BARE = "base"
"""How the untouched base is called among the voices."""


@dataclass(frozen=True)
class Reading:
    """A conversation as it is read: through a chat template (its Jinja source), and what ends the answer."""

    chat_template: str
    prompt: str
    ends: tuple[str, ...]


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

    @property
    def names(self) -> list[str]:
        """Who can be asked."""
        return list(self.slots)

    def reading(self, name: str, conversation: Conversation) -> Reading:
        """How a voice reads a conversation that waits for its answer."""
        self.slot(name)
        renderer = self.renderer_of(name)
        prompt = self.base.tokenizer.decode(renderer.prompt(conversation))
        ends = self.base.tokenizer.convert_ids_to_tokens(sorted(renderer.stop_tokens))
        return Reading(renderer.chat_template, prompt, tuple(ends))

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
        return [answer.text for answer in self.answers(conversations, config, on_text=on_text)]

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

        def hear(index: int, piece: Piece) -> None:
            if on_text is not None and piece.text:
                on_text(piece.text)

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
    found = find(path, which=which, chat_template=chat_template, notify=notify)
    tokenizer = loading.load_tokenizer(found.model)
    base = loading.load(found.model, tokenizer=tokenizer, notify=notify)
    renderers = renderers_of(found, tokenizer)
    trained = Trained(base, Bank(base), renderers.pop(BARE), renderers=renderers)
    if found.trained_base is not None:
        name, folder = found.trained_base
        trained.slots = {name: BARE_BASE}
        _attach_value_head(trained, name, folder)
    for name, folder in found.adapters.items():
        saved = load_adapter(folder)
        slot = trained.bank.add(saved.config, seed=0)
        trained.bank.load(slot, saved.tensors)
        trained.slots[name] = slot
        trained.folders[name] = folder
        _attach_value_head(trained, name, folder)
    return trained


def renderers_of(found: Found, tokenizer: Any) -> dict[str, Renderer]:
    """How the base (`base`) and each adapter read a conversation; those with the same settings share a renderer."""
    made: dict[str, Renderer] = {}
    settings = {BARE: found.data, **{name: found.data_of.get(name, found.data) for name in found.adapters}}
    keys = {name: data.model_dump_json(exclude={"train", "eval"}) for name, data in settings.items()}
    return {name: made.setdefault(keys[name], Renderer(tokenizer, data)) for name, data in settings.items()}


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
