"""A merged model whose linear layers are in few bits, in a checkpoint that other programs load: one format each.

Every weight is the original plus the adapter's update, in float32, and only then quantized: with GPTQ's compensation
where texts are at hand, in one pass over the decoder layers, else to the nearest. Heads and embeddings stay, and so do
norms unless AWQ's scales are folded into them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import nn

from lowrank.errors import ModelError, raise_all
from lowrank.export import ExportProgress, Needs, ReadBack, Tolerance
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import Names
from lowrank.export.publish.usage_example import TO_A_SERVER, usage_code
from lowrank.export.quantize.activation_aware import Scaled
from lowrank.export.quantize.calibration import LENGTH, quantize_in_order, texts_of
from lowrank.export.source import Source, with_pictures
from lowrank.export.verify.readers import read_model
from lowrank.export.writing.side_files import write_side_files
from lowrank.export.writing.sizes import format_size, parse_size
from lowrank.models.layers import is_outside, language_model
from lowrank.models.loading.checkpoint_files import INDEX, SINGLE
from lowrank.models.loading.quantize_on_load import linears_to_pack
from lowrank.settings import Settings

_GROUP_SIZES = (128, 64, 32)


class PackedSettings(Settings):
    """What the packed formats have in common."""

    calibration: Path | None = None
    """A text file (UTF-8) like what the model will be used for. Left out: rows it was trained on, if they are there."""
    calibrate: bool = True
    """Let the weights make up for each other's rounding on those texts (GPTQ). It loads the model; false rounds every
    weight to the nearest, which needs next to no memory."""
    max_shard_size: str = "2GB"
    """Size of one weight file at the most; so much is in memory."""


class Format(Protocol):
    """How one program wants its packed weights."""

    bits: float
    """A weight, scales included."""
    tolerance: Tolerance

    @property
    def settings(self) -> PackedSettings:
        """The target's."""
        ...

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Why layers of these shapes (O, D), by name, cannot be written."""
        ...

    def pack(
        self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors by suffix, and the weight that a reader gets of them. `dtype`: of the base's weight."""
        ...

    def describe(
        self, shapes: Mapping[str, tuple[int, int]], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """`quantization_config`; `others`: linear layers that stay as they are."""
        ...

    def usage(self, path: str, example: str) -> str:
        """How it is run. `example`: Python that asks it, with transformers."""
        ...


class ScaledFormat(Format, Protocol):
    """A format whose inputs have scales (AWQ)."""

    def rounded(self, weight_OD: torch.Tensor, moment_DD: torch.Tensor) -> torch.Tensor:
        """What comes back of a weight; the scales are chosen by it."""
        ...


@dataclass(frozen=True)
class _Planned:
    """What is decided before anything is written."""

    merged: Merged
    files: dict[str, str]
    """Name in the files of each linear's weight, by its name in the model."""
    shapes: dict[str, tuple[int, int]]
    others: list[str]
    dtype: torch.dtype
    file_name: Callable[[str], str]
    """The name in the files of any parameter of the model."""


class PackedTarget:
    """See the module."""

    def __init__(self, form: Format, name: str) -> None:
        self.form = form
        self.name = name
        self._known: tuple[Source, _Planned] | None = None

    def needs(self, source: Source) -> Needs:
        """The packed weights; the model in memory while it is calibrated."""
        planned = self._plan(source)
        raise_all(ModelError, f"--to {self.name}", self.form.incompatibility(planned.shapes))
        packed = sum(rows * columns for rows, columns in planned.shapes.values())
        weights = {planned.files[name] for name in planned.shapes}
        rest = sum(_size(planned.merged, name) for name in planned.merged if name not in weights)
        disk = int(packed * self.form.bits / 8) + rest + (64 << 20)
        most = min(parse_size(self.form.settings.max_shard_size), disk)
        texts = self._texts(source)
        widest = max(columns for _, columns in planned.shapes.values())
        largest = max(rows * columns for rows, columns in planned.shapes.values())
        memory = most + 24 * largest
        if len(texts):
            memory += 4 * sum(torch.Size(plan.shape).numel() for plan in planned.merged.values())
            memory += int(packed * self.form.bits / 8) + 4 * 8 * widest**2
            where = self._where() + with_pictures(texts)
            how = f"calibrated on {len(texts)} documents ({where}) with GPTQ's compensation"
        elif not self.form.settings.calibrate:
            how = "rounded to the nearest, as asked (calibrate=false)"
        else:
            how = "rounded to the nearest, since there is no text to calibrate on (give one: calibration=FILE)"
        kept = f"; {len(planned.others)} other linear layers stay as they are" if planned.others else ""
        return Needs(
            disk, memory, (f"{len(planned.shapes)} layers packed from original + update in float32, {how}{kept}",)
        )

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """Weights, configuration, tokenizer, template."""
        planned = self._plan(source)
        texts = self._texts(source)
        ready: dict[str, dict[str, torch.Tensor]] = {}
        scaled = self._scaled(planned)

        def quantize(name: str, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None) -> torch.Tensor:
            exact_OD = planned.merged.tensor(planned.files[name], torch.float32).to(weight_OD.device)
            if scaled is not None:
                exact_OD = scaled.weight(name, exact_OD)
            tensors, value_OD = self.form.pack(exact_OD, moment_DD, planned.dtype)
            ready[name] = {suffix: tensor.cpu() for suffix, tensor in tensors.items()}
            return value_OD

        total = 2 if len(texts) else 1
        if len(texts):
            quantize_in_order(
                source, planned.merged, planned.shapes.keys(), texts, quantize,
                lambda done, of: progress(1000 * done // of, 1000 * total, "calibrating"),
                prepare=None if scaled is None else scaled.prepare,
            )  # fmt: skip
        written = _write_shards(
            self._tensors(planned, ready, scaled.changed if scaled else {}), len(planned.merged),
            parse_size(self.form.settings.max_shard_size), folder,
            lambda done, of: progress(1000 * (total - 1) + 1000 * done // of, 1000 * total, "writing"),
        )  # fmt: skip
        described = self.form.describe(planned.shapes, planned.others, planned.dtype)
        write_side_files(source, folder, untied=planned.merged.untied, quantization=described)
        notes = [f"{format_size(written)} of weights"]
        if scaled is not None and scaled.considered:
            notes.append(f"AWQ's scales on the inputs of {scaled.folded} of {scaled.considered} layers")
        return notes

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """The folder as lowrank's own reader of the format loads it."""
        return (
            ReadBack(
                self.name,
                self.form.tolerance,
                lambda: read_model(source, folder),
                compares_images=source.supports_images,
            ),
        )

    def usage(self, source: Source, path: str) -> str:
        """By the format."""
        return self.form.usage(path, usage_code(source.base, path)) + (TO_A_SERVER if source.supports_images else "")

    def _texts(self, source: Source) -> Sequence[Any]:
        settings = self.form.settings
        return texts_of(source, settings.calibration) if settings.calibrate else ()

    def _where(self) -> str:
        path = self.form.settings.calibration
        return f"rows it was trained on, {LENGTH} tokens each at most" if path is None else path.name

    def _plan(self, source: Source) -> _Planned:
        if self._known is None or self._known[0].base != source.base or self._known[0].adapter is not source.adapter:
            self._known = source, _planned(source)
        return self._known[1]

    def _scaled(self, planned: _Planned) -> Scaled | None:
        if not hasattr(self.form, "rounded"):
            return None
        return Scaled(planned.merged, planned.file_name, cast(ScaledFormat, self.form).rounded)

    def _tensors(
        self,
        planned: _Planned,
        ready: Mapping[str, Mapping[str, torch.Tensor]],
        changed: Mapping[str, torch.Tensor],
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors that each one of the merged model becomes, in the base's order."""
        linears = {file: name for name, file in planned.files.items()}
        for file in planned.merged:
            name = linears.get(file)
            if name is None:
                yield {file: changed[file] if file in changed else planned.merged.tensor(file)}
                continue
            tensors = ready.get(name)
            if tensors is None:
                tensors, _ = self.form.pack(planned.merged.tensor(file, torch.float32), None, planned.dtype)
            stem = file.removesuffix("weight")
            yield {stem + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}


def group_size_for(shapes: Mapping[str, tuple[int, int]], wanted: int) -> int:
    """`wanted`, or for 0 the largest usual one that divides the inputs of all layers; -1: a row is one group."""
    if wanted:
        return wanted
    fits = (size for size in _GROUP_SIZES if all(columns % size == 0 for _, columns in shapes.values()))
    return next(fits, -1)


def group_size_problem(shapes: Mapping[str, tuple[int, int]], group_size: int) -> list[str]:
    """Layers whose inputs a group size does not divide."""
    odd = [name for name, (_, columns) in shapes.items() if group_size > 0 and columns % group_size]
    if not odd:
        return []
    columns = shapes[odd[0]][1]
    return [f"group_size {group_size} does not divide the {columns} inputs of {odd[0]}; leave it out, or take -1"]


def _planned(source: Source) -> _Planned:
    merged = Merged(source)
    if merged.checkpoint.method:
        raise ModelError(
            f"{source.model.path}: its weights are quantized already ({merged.checkpoint.method}), and twice is worse; "
            "name the 16-bit model it was made from as the base, or export --to merged or gguf"
        )
    names = Names(source.base, merged.checkpoint, trust_remote_code=source.model.runs_own_code)
    language = language_model(names.model)[0]
    fused = [
        name
        for name, parameter in names.model.named_parameters()
        if parameter.ndim > 2 and not is_outside(name, language)  # a tower has convolutions
    ]
    if fused:
        raise ModelError(
            f"{source.model.path}: a mixture of experts ({fused[0]}, ...), not packed yet; export --to gguf"
        )
    linears = {
        name: module
        for name, module in linears_to_pack(names.model, None).items()
        if isinstance(module, nn.Linear) and not is_outside(name, language)
    }
    files = {name: names.file_name(f"{name}.weight") for name in linears}
    files = {name: file for name, file in files.items() if file in merged}
    if not files:
        raise ModelError(f"{source.model.path}: no linear layer that could be packed (GPT-2's are transposed)")
    others = [
        name for name, module in names.model.named_modules() if isinstance(module, nn.Linear) and name not in files
    ]
    shapes = {name: (merged[file].shape[0], merged[file].shape[1]) for name, file in files.items()}
    return _Planned(merged, files, shapes, others, merged[next(iter(files.values()))].dtype, names.file_name)


def _size(merged: Merged, name: str) -> int:
    return torch.Size(merged[name].shape).numel() * merged[name].dtype.itemsize


def _write_shards(
    tensors: Iterator[dict[str, torch.Tensor]], count: int, most: int, folder: Path, tick: Callable[[int, int], None]
) -> int:
    """Safetensors files of at most `most` bytes and their index; the bytes of all tensors."""
    shards: list[list[str]] = []
    gathered: dict[str, torch.Tensor] = {}
    total = filled = 0

    def flush() -> None:
        save_file(gathered, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(gathered))
        gathered.clear()

    for number, some in enumerate(tensors):
        size = sum(tensor.nbytes for tensor in some.values())
        if gathered and filled + size > most:
            flush()
            filled = 0
        gathered.update(some)
        filled, total = filled + size, total + size
        tick(number + 1, count)
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        single = len(shards) == 1
        name = SINGLE if single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
