"""What is exported: a base on disk, the adapters on it, and how training wrote conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.hub_names import is_hub_name
from lowrank.media.processor import processor_of
from lowrank.models.config import ModelConfig
from lowrank.segments import Segment


@dataclass(frozen=True)
class Source:
    """A base and what was trained on it. Nothing of it is in memory but the adapter."""

    name: str
    """What a file or model of it is called: the job's or the adapter folder's name."""
    base: Path
    """A folder with the base's config.json, safetensors and tokenizer files."""
    model: ModelConfig
    """How the base was named and loaded (`path` may be a hub name, `storage` what training kept it in); `dtype` and
    `device`: what verification computes in and where."""
    adapter: AdapterOnDisk | None
    """None: the base as it is, which is also what a full-parameter run gives."""
    tokenizer: Any
    chat_template: str | None
    """The Jinja source that training used; None where there is none (plain text)."""
    stop_tokens: frozenset[int] = frozenset()
    """Ids that end an answer: EOS and the template's end of turn."""
    documents: Callable[[int], Sequence[Segment]] | None = None
    """At most so many documents that it was trained on, with their pictures; None: its data is not at hand."""
    own_tokens: bool = False
    """The tokenizer has tokens that the base's files lack: the adapter's own."""
    value_head: torch.Tensor | None = None
    """(D) What weighs the last hidden state of an answer to its reward, or for PPO's critic; None: there is none."""
    is_reward_model: bool = False
    """It is a reward model: its value head is what was trained."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the model card: data, method, metrics from the run's summary.json; empty for what no run made."""

    @property
    def supports_images(self) -> bool:
        """Whether the base can be shown pictures, so that what is written is asked about one too."""
        processor = processor_of(self.tokenizer)
        return processor is not None and processor.supports_images

    @property
    def hub_base(self) -> str | None:
        """The base's name on the hub; None for a folder, whose path is nobody else's business."""
        name = str(self.facts.get("base") or self.model.path)
        on_hub = is_hub_name(name) and not name.startswith("lowrank/") and not Path(name).exists()
        return name if on_hub else None


def with_pictures(documents: Sequence[Segment]) -> str:
    """How many of them have pictures, videos or sounds, which are shown, for people; empty: none."""
    number = sum(each.media is not None for each in documents)
    return f", {number} of the documents with their pictures, videos or sounds" if number else ""
