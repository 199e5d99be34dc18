"""Models in this process as a `Reader`: a base with an adapter, or a folder that transformers loads."""

from __future__ import annotations

import gc
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.batches import BARE_BASE, Segment, pack
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.export.source import Source
from lowrank.generate.sampler import GenerationConfig, Prompt, generate
from lowrank.models.base import Base
from lowrank.models.config import ModelConfig
from lowrank.models.storages.dense import DenseConfig

_LOGITS_AT_ONCE = 1 << 24
"""Elements of the (rows, V) blocks of logits."""


class BankReader:
    """A base and one slot of its bank (-1: the base alone)."""

    def __init__(self, base: Base, bank: Bank, slot: int = BARE_BASE) -> None:
        self.base = base
        self.bank = bank
        self.slot = slot

    def logprobs(self, token_L: np.ndarray, prompt: int | None = None) -> np.ndarray:
        """See `Reader`."""
        document = Segment(token_L, np.zeros(len(token_L), np.float32), prompt=prompt)
        segment = self.bank.prompted(self.slot, document)
        batch = pack([(self.slot, segment)]).to(self.base.device)
        with torch.no_grad():
            hidden_LD = self.bank.hidden(batch)[segment.virtual :]
            head = self.bank.head(self.slot)
            step = max(1, _LOGITS_AT_ONCE // head.weight_VD.shape[0])
            blocks = [head.logits(part).log_softmax(-1).float().cpu() for part in hidden_LD.split(step)]
        return torch.cat(blocks).numpy()

    def greedy(self, token_L: np.ndarray, max_new_tokens: int, stop_tokens: frozenset[int]) -> list[int]:
        """See `Reader`."""
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        return generate(self.base, self.bank, [Prompt(token_L, self.slot)], config, stop_tokens=stop_tokens)[0]

    def __enter__(self) -> BankReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.base, self.bank
        gc.collect()  # modules and their hooks refer to one another


def read_adapter(source: Source, adapter: AdapterOnDisk | None) -> BankReader:
    """The source's base, loaded with an adapter (None: alone) in `source.model`'s dtype and on its device."""
    model = source.model.model_copy(update={"path": str(source.base), "revision": None})
    reader = _load(model, source)
    if adapter is not None:
        reader.slot = reader.bank.add(adapter.config, seed=0)
        reader.bank.load(reader.slot, adapter.tensors)
    return reader


def read_model(source: Source, folder: Path) -> BankReader:
    """A model in transformers' layout, on the source's device and in its dtype."""
    return _load(source.model.model_copy(update={"path": str(folder), "revision": None}), source)


def _load(model: ModelConfig, source: Source) -> BankReader:
    # Dense: the weights that are exported are those on disk, whatever training kept them in.
    model = model.model_copy(update={"storage": DenseConfig(), "activation_checkpointing": "none"})
    base = loading.load(model, tokenizer=source.tokenizer, notify=lambda text: None)
    return BankReader(base, Bank(base))
