"""Weights of the base in an adapter's file: an embedding and a head that PEFT saved with it.

PEFT does so where it sees one adapted or resized. Where they are the base's own they say nothing; where they differ
(rows of tokens that the base had to spare, an embedding trained before) they are the adapter's, which is nothing
without them. Where there are more rows than the base has, tokens were added: the adapter fits a base with as many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from lowrank.adapters.targets import innermost, name_of
from lowrank.checkpoints.language_names import on_composite
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError, raise_all

_OTHER_BASE = "this adapter was trained on another base than this one"
WeightOf = Callable[[str], torch.Tensor | None]
"""A weight of the base by the model's name for it; None where it has none of that name."""


def on_model(adapter: AdapterOnDisk, model: Any) -> AdapterOnDisk:
    """`on_base` for a base in memory, whatever the bank wrapped around its layers; with the names of a composite base,
    where it was trained on the language model in it."""
    adapter = on_composite(adapter, model)
    if not adapter.base_tensors and not adapter.copies:
        return adapter
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied: set[str] = set()
    if head is not None and getattr(innermost(head), "weight", None) is getattr(innermost(embedding), "weight", 0):
        tied = {f"{name_of(model, module)}.weight" for module in (embedding, head)}

    def weight_of(name: str) -> torch.Tensor | None:
        path, _, key = name.rpartition(".")
        try:
            found = getattr(innermost(model.get_submodule(path)), key, None)
        except AttributeError:
            return None
        return found.detach().cpu() if isinstance(found, torch.Tensor) else None

    return on_base(adapter, weight_of, tied)


def refuse_other_shapes(adapter: AdapterOnDisk, shape_of: Callable[[str], tuple[int, ...] | None]) -> None:
    """What `on_base` would refuse for its shape, before any weight of the base is read: from its files' headers alone.
    `shape_of`: by the model's name for a weight; None where that is not known yet."""
    saved = dict(adapter.base_tensors)
    for name in adapter.copies:
        if f"{name}.weight" in adapter.tensors:
            saved[f"{name}.weight"] = adapter.tensors[f"{name}.weight"]
    problems = []
    for name, tensor in saved.items():
        shape = shape_of(name)
        if shape is not None and shape != tuple(tensor.shape):
            problems.append(_other_shape(name, tensor, shape))
    raise_all(ModelError, _OTHER_BASE, problems)


def on_base(adapter: AdapterOnDisk, weight_of: WeightOf, tied: Collection[str] = ()) -> AdapterOnDisk:
    """The adapter as it is on this base: weights in its file that differ from the base's become copies of its own
    (modules_to_save), the others are forgotten. `tied`: names of the one tensor that embedding and head share.

    ModelError for tensors that fit no weight of the base; where tokens were added, it names `lowrank vocab`.
    """
    problems, own = [], {}
    for name in adapter.copies:
        saved, weight = adapter.tensors.get(f"{name}.weight"), weight_of(f"{name}.weight")
        if saved is not None and weight is not None and saved.shape != weight.shape:
            problems.append(_other_shape(f"{name}.weight", saved, weight.shape))
    for name, saved in adapter.base_tensors.items():
        weight = weight_of(name)
        if weight is None:
            problems.append(f"{name}: neither part of the adapter nor of the base")
        elif weight.shape != saved.shape:
            problems.append(_other_shape(name, saved, weight.shape))
        elif not _same(saved, weight):
            own[name] = saved
    problems += [
        f"{name}: other values than the base's, and an adapter on it: it fits only the base it was trained on"
        for name in own
        if name.rpartition(".")[0] in adapter.targets
    ]
    raise_all(ModelError, _OTHER_BASE, problems)
    if own.keys() & set(tied):  # one tensor in the base: what the adapter has instead goes to both ends
        shared = next(own[name] for name in sorted(own.keys() & set(tied)))
        own |= {name: shared for name in tied if name not in own and name.rpartition(".")[0] not in adapter.copies}
    if not own:
        return replace(adapter, base_tensors={})
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in own))
    config = adapter.config.model_copy(update={"modules_to_save": (*adapter.copies, *modules)})
    note = f"{', '.join(sorted(own))}: other values in the adapter's file than in the base; they are the adapter's own"
    return replace(
        adapter, config=config, tensors={**adapter.tensors, **own}, base_tensors={}, notes=(*adapter.notes, note)
    )


def _same(saved: torch.Tensor, weight: torch.Tensor) -> bool:
    """Equal, or as equal as a file of fewer bits can say it."""
    if torch.equal(weight, saved.to(weight.dtype)):
        return True
    return any(
        torch.equal(saved.to(dtype).to(saved.dtype), saved) and torch.equal(weight.to(dtype), saved.to(dtype))
        for dtype in (torch.bfloat16, torch.float16)
    )


def _other_shape(name: str, saved: torch.Tensor, wanted: tuple[int, ...]) -> str:
    text = f"{name}: shape {tuple(saved.shape)} in the adapter's file, {tuple(wanted)} in the base"
    if saved.ndim == 2 and len(wanted) == 2 and saved.shape[1] == wanted[1] and len(saved) > wanted[0]:
        text += (
            f"; {len(saved) - wanted[0]} tokens were added before it was trained, so their rows have no place here. "
            "`lowrank vocab BASE --tokens ... -o FOLDER` makes a base with as many (the added tokens stand in the "
            "adapter's tokenizer files, in their order); then give FOLDER as the base"
        )
    return text
