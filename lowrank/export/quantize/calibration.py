"""What the layers of the merged model see of a user's texts, and their weights quantized in that light.

Decoder layer after decoder layer: the second moments of its linears' inputs are taken, its weights are replaced by
quantized ones, and what the layer makes of the texts then is what the next one sees. One layer's moments are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import lowrank.models.loading.pretrained as loading
from lowrank.batches import BASE_SLOT, Batch, pack
from lowrank.errors import DataError, ModelError
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import Names
from lowrank.export.source import Source
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.layers import decoder_layers
from lowrank.models.storages.dense import DenseConfig
from lowrank.segments import Segment, unweighted

DOCUMENTS = 128
LENGTH = 512
"""Documents looked at, and tokens of each: GPTQ's authors took 128 of 2048."""
_FEWEST_TOKENS = 256
_ENOUGH = 16
"""Tokens of a document that shows how a layer computes."""

Quantize = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`(linear's name, weight (O, D), second moments (D, D) or None)` -> the weight that will be read from the file."""

Prepare = Callable[[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], Callable[[], torch.Tensor]], None]
"""`(modules of a layer by name, its linears, their moments, one document through it)`: before it is quantized."""


def texts_of(source: Source, path: Path | None) -> Sequence[Segment]:
    """Documents to calibrate on: those of a text file (UTF-8), else rows the model was trained on; none if it has none.

    Raises DataError for a file that cannot be read or is too short.
    """
    if path is None:
        return () if source.documents is None else source.documents(DOCUMENTS)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"calibration: {path} cannot be read: {error}") from error
    tokens = source.tokenizer(text[: 8 * DOCUMENTS * LENGTH], add_special_tokens=False, verbose=False).input_ids
    if len(tokens) < _FEWEST_TOKENS:
        raise DataError(f"calibration: {path} has {len(tokens)} tokens; at least {_FEWEST_TOKENS} are needed")
    tokens = np.asarray(tokens[: DOCUMENTS * LENGTH], np.int64)
    return [unweighted(tokens[start : start + LENGTH]) for start in range(0, len(tokens), LENGTH)]


def quantize_in_order(
    source: Source,
    merged: Merged,
    linears: Collection[str],
    documents: Sequence[Segment],
    quantize: Quantize,
    tick: Callable[[int, int], None],
    prepare: Prepare | None = None,
) -> None:
    """Call `quantize` once for each of `linears`, those outside of the decoder layers last and without moments.
    Documents are read with their pictures: the tower looks at each once.

    `prepare` may change a layer, and the moments with it, as long as it computes the same.
    """
    base = _loaded(source, merged)
    stack = decoder_layers(base.model)
    if stack is None:
        raise ModelError(
            f"{source.model.path}: it has no single list of decoder layers; calibrate=false rounds as it is"
        )
    all_names: dict[Any, str] = {module: name for name, module in base.model.named_modules()}
    names = {module: name for module, name in all_names.items() if name in linears}
    shortest = min(range(len(documents)), key=lambda number: max(_ENOUGH, len(documents[number])))
    batches = _ready(base, documents)
    states: list[torch.Tensor | None] = [None] * len(documents)
    done = 0
    with torch.no_grad():
        for index, layer in enumerate(stack):
            own: dict[str, Any] = {names[module]: module for module in layer.modules() if module in names}
            with _only(stack, index) as reach, _moments(own) as moments:
                for number, batch in enumerate(batches):
                    reach(base, batch, states[number])
            if prepare is not None:
                parts = {all_names[module]: module for module in layer.modules()}
                with _only(stack, index) as reach:
                    prepare(parts, own, moments, partial(reach, base, batches[shortest], states[shortest]))
            for name, module in own.items():
                module.weight.copy_(quantize(name, module.weight, moments.get(name)))
                done += 1
                tick(done, len(linears))
            with _only(stack, index) as reach:
                states = [reach(base, batch, state, through=True) for batch, state in zip(batches, states)]
        inside = {module for layer in stack for module in layer.modules()}
        for module, name in names.items():
            if module not in inside:
                quantize(name, module.weight, None)


def _ready(base: Base, documents: Sequence[Segment]) -> list[Batch]:
    """Each as a batch, with what the towers say of its media at hand and the pixels put away."""
    batches = [pack([(BASE_SLOT, document)]) for document in documents]
    kinds = sorted({each.kind for document in documents if document.media for each in document.media.inside})
    if not kinds:
        return [batch.to(base.device) for batch in batches]
    processor = processor_of(base.tokenizer)
    assert processor is not None, "it has rendered their media"
    give_media_encoder(base, processor, kinds=kinds, answering=True)
    encoder = base.media_encoder
    assert encoder is not None
    encoder.shared.keep(batches, {BASE_SLOT})
    ready = []
    for batch in batches:
        if batch.media:
            batch = encoder.ready(batch).to(base.device)
            encoder.options(batch, batch.token_T[None])
            batch = replace(batch, pixels=tuple(replace(each, tensors={}) for each in batch.pixels))
        ready.append(batch.to(base.device))
    return ready


def _loaded(source: Source, merged: Merged) -> Base:
    """The merged model, in transformers."""
    own = {"path": str(source.base), "revision": None, "storage": DenseConfig(), "activation_checkpointing": "none"}
    base = loading.load(source.model.model_copy(update=own), tokenizer=source.tokenizer, notify=lambda text: None)
    names = Names(source.base, merged.checkpoint, trust_remote_code=source.model.runs_own_code)
    for name, parameter in base.model.named_parameters():
        file_name = names.file_name(name)
        if file_name in merged and merged[file_name].change is not None:
            with torch.no_grad():
                parameter.copy_(merged.tensor(file_name, torch.float32))
    return base


@contextmanager
def _moments(linears: dict[str, nn.Module]) -> Generator[dict[str, torch.Tensor], None, None]:
    """Means of x x^T over all tokens, (D, D) float32, by linear; those that saw none are not in it."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def listen(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            del module
            x_TD = given[0].detach().reshape(-1, given[0].shape[-1]).float()
            if len(x_TD):
                sums[name] = sums.get(name, torch.zeros((), device=x_TD.device)) + x_TD.t() @ x_TD
                counts[name] = counts.get(name, 0) + len(x_TD)

        return hook

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in linears.items()]
    found: dict[str, torch.Tensor] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.update({name: total / counts[name] for name, total in sums.items()})


class _Reach(Protocol):
    """Runs a document through one decoder layer, beginning with its input (None for the first: embeddings do it)."""

    def __call__(self, base: Base, batch: Batch, state: torch.Tensor | None, *, through: bool = False) -> torch.Tensor:
        """What the layer makes of it. `through`: what the next layer is given, where there is one: models add to what
        a layer makes (Qwen3-VL, what its tower has said)."""
        ...


@contextmanager
def _only(stack: nn.ModuleList, index: int) -> Generator[_Reach, None, None]:
    """The layer at `index` alone."""
    entering: list[torch.Tensor | None] = [None]
    leaving: list[torch.Tensor] = []
    goes_on = [False]

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        if entering[0] is None:
            return None
        if args:
            return (entering[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": entering[0]}

    def leave(module: Any, args: Any, output: Any) -> None:
        del module, args
        if not goes_on[0]:
            leaving.append(output[0] if isinstance(output, tuple) else output)
            raise _Enough

    def enter_next(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        leaving.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    def reach(base: Base, batch: Batch, state: torch.Tensor | None, *, through: bool = False) -> torch.Tensor:
        entering[0], goes_on[0] = state, through and index + 1 < len(stack)
        try:
            base.hidden(batch)
        except _Enough:
            return leaving.pop()
        raise AssertionError("the layer was not reached")

    own = stack[index]
    handles = [own.register_forward_pre_hook(enter, with_kwargs=True), own.register_forward_hook(leave)]
    handles += [each.register_forward_pre_hook(enter_next, with_kwargs=True) for each in stack[index + 1 : index + 2]]
    before = list(stack)[:index]
    try:
        for place, layer in enumerate(before):
            stack[place] = _Skipped(layer)
        yield reach
    finally:
        for place, layer in enumerate(before):
            stack[place] = layer
        for handle in handles:
            handle.remove()


class _Skipped(nn.Module):
    """In a decoder layer's place: gives what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        """What the model reads of its layers before it calls them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(1, T, D)"""
        del args, kwargs
        return hidden_states


class _Enough(Exception):
    """The layer has answered; nothing after it matters."""
