"""The names tensors have in a checkpoint's files, and those of the model that transformers makes of it.

They differ by renamings, by a prefix, and where transformers 5 fuses tensors (the experts of mixtures). Whatever is
renamed only can be merged in place. Asked of transformers' own loader, on a model without memory (`meta`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.targets import is_embedding, is_linear
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError
from lowrank.export.merge.expert_merge import ExpertSlice, is_transposed, pieces_of
from lowrank.export.merge.weights import TensorSource
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import FILE_FAULTS

_SHOWN = 12


class Names:
    """Of every parameter of the model: the tensor in the files that it is loaded from."""

    def __init__(
        self, folder: Path, checkpoint: Mapping[str, TensorSource], *, trust_remote_code: bool = False
    ) -> None:
        self.model = model_without_memory(folder, trust_remote_code=trust_remote_code)
        self.checkpoint = checkpoint
        state = self.model.state_dict(keep_vars=True)
        self._file_name: dict[str, str] = {}
        self._converted: dict[str, list[str]] = {}
        for name, parameter, converted in _loaded_from(self.model, state, checkpoint):
            if converted:
                self._converted.setdefault(parameter, []).append(name)
            else:
                self._file_name[parameter] = name
        self.tied = _tied(self.model, state)
        """Parameters that are one tensor in the base: usually the embedding's weight and the head's."""

    @property
    def parameters(self) -> dict[str, str]:
        """The parameter that each tensor in the files becomes, where nothing but its name changes on the way."""
        return {name: parameter for parameter, name in self._file_name.items()}

    def is_transposed(self, module: str) -> bool:
        """A layer that keeps its weight as (D, O): GPT-2's Conv1D."""
        return isinstance(self.model.get_submodule(module), Conv1D)

    def has_linear(self, module: str) -> bool:
        """Whether a linear layer goes by this name."""
        try:
            return is_linear(self.model.get_submodule(module))
        except AttributeError:
            return False

    def layer_shape(self, module: str) -> tuple[int, int]:
        """(O, D) of a linear layer."""
        first, second = self.model.get_submodule(module).weight.shape
        return (second, first) if self.is_transposed(module) else (first, second)

    def origin(self, parameter: str) -> str:
        """The tensor in the files that holds a parameter's values; of a tied one perhaps under its twin's name."""
        pair = [parameter, *sorted(self.tied - {parameter})] if parameter in self.tied else [parameter]
        return next(self._file_name[name] for name in pair if name in self._file_name)

    def file_name(self, parameter: str) -> str:
        """Its name in the files; where it is not in them (a tied head), the model's own name for it."""
        return self._file_name.get(parameter, parameter)

    def refusals(self, adapter: AdapterOnDisk) -> list[str]:
        """Why this adapter cannot be merged into this base: one sentence for every tensor that does not fit."""
        problems = [problem for module in adapter.targets for problem in self._misfits(module, adapter)]
        shared = adapter.config.build().frozen
        own = [
            name
            for name in adapter.tensors
            if name not in shared and not any(name.startswith(f"{module}.") for module in adapter.targets)
        ]
        for name in own:
            weight = f"{name.removesuffix(TOKEN_ROWS)}weight" if name.endswith(TOKEN_ROWS) else name
            problem = self._unmergeable(weight)
            if problem is None and weight != name:
                problems += self._missing_rows(weight, adapter)
            elif problem is not None:
                problems.append(problem)
            elif adapter.tensors[name].shape != self._entry(name).shape:
                problems.append(f"{name}: {_shape(adapter.tensors[name])} in the adapter, {self._describe(name)}")
        return problems if len(problems) <= _SHOWN else [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]

    def _misfits(self, module: str, adapter: AdapterOnDisk) -> list[str]:
        weight = f"{module}.weight"
        if module in adapter.config.target_parameters:
            return self._expert_misfits(module, adapter)
        problem = self._unmergeable(weight)
        if problem is not None:
            return [problem]
        layer = self.model.get_submodule(module)
        if not is_linear(layer) and not is_embedding(layer):
            return [f"{module} is a {type(layer).__name__} in the base, no layer that an adapter goes to"]
        shape = self._entry(weight).shape
        tall, wide = (shape[1], shape[0]) if is_embedding(layer) or self.is_transposed(module) else shape
        wanted = {"lora_A.weight": (1, wide), "lora_embedding_A": (1, wide),
                  "lora_B.weight": (0, tall), "lora_embedding_B": (0, tall)}  # fmt: skip
        return [
            f"{module}.{part}: {_shape(adapter.tensors[f'{module}.{part}'])} in the adapter, {self._describe(weight)}"
            for part, (axis, length) in wanted.items()
            if f"{module}.{part}" in adapter.tensors and adapter.tensors[f"{module}.{part}"].shape[axis] != length
        ]

    def _missing_rows(self, weight: str, adapter: AdapterOnDisk) -> list[str]:
        """Tokens that the base has no rows for."""
        rows = self._entry(weight).shape[0]
        beyond = [token for token in adapter.config.trainable_token_indices if int(token) >= rows]
        return [f"{weight}: the adapter has rows for tokens {beyond}, {self._describe(weight)}"] if beyond else []

    def _expert_misfits(self, parameter: str, adapter: AdapterOnDisk) -> list[str]:
        try:
            experts, rows, columns = self.model.get_parameter(parameter).shape
            self.pieces(parameter)
        except AttributeError:
            return [f"{parameter}: the base has no such experts"]
        except ModelError as error:
            return [str(error)]
        if is_transposed(self.model, parameter):
            rows, columns = columns, rows
        A, B = (adapter.tensors[f"{parameter}.lora_{part}.weight"] for part in ("A", "B"))
        if A.shape[1] == columns and B.shape[0] == rows and A.shape[0] == B.shape[1] and A.shape[0] % experts == 0:
            return []
        described = f"{experts} experts of ({rows}, {columns}) in the base"
        return [f"{parameter}: A {_shape(A)} and B {_shape(B)} in the adapter, {described}"]

    def pieces(self, parameter: str) -> list[ExpertSlice] | None:
        """The tensors in the files that fused experts are made of; None where they are one there too."""
        if parameter in self._file_name:
            return None
        return pieces_of(self.model, parameter, self._converted.get(parameter, ()))

    def _unmergeable(self, parameter: str) -> str | None:
        if parameter in self._converted:
            files = self._converted[parameter]
            return f"{parameter}: transformers makes it of {len(files)} tensors ({files[0]}, ...), not yet mergeable"
        if parameter in self._file_name or (parameter in self.tied and self.tied & self._file_name.keys()):
            return None
        return f"{parameter}: the base has no such tensor"

    def _entry(self, parameter: str) -> TensorSource:
        return self.checkpoint[self.origin(parameter)]

    def _describe(self, parameter: str) -> str:
        return f"{self._entry(parameter).shape} in the base ({self.origin(parameter)})"


def refuse_unmergeable(name: str, adapter: AdapterOnDisk) -> None:
    """ModelError for an adapter that no weights can take in."""
    reason = adapter.config.unmergeable
    if reason is not None:
        raise ModelError(f"{name}: {adapter.config.title}: {reason}")


def _loaded_from(
    model: Any, state: Mapping[str, torch.Tensor], checkpoint: Mapping[str, TensorSource]
) -> Iterator[tuple[str, str, bool]]:
    """(name in the files, parameter, whether anything but its name changes on the way)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    for name in sorted(checkpoint, key=dot_natural_key):  # some renamings wait for an earlier name
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(state))
        if renamed not in state and name in state:
            renamed, pattern = name, None
        if renamed in state:
            same = pattern is None and checkpoint[name].shape == tuple(state[renamed].shape)
            resized = pattern is None and len(checkpoint[name].shape) == state[renamed].ndim
            yield name, renamed, not (same or resized)


def _tied(model: Any, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the one tensor that embedding and head share; empty if they do not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", 0):
        return set()
    return {name for name, tensor in state.items() if tensor is head.weight}


def model_without_memory(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder's config.json, on torch's `meta` device: shapes and names, no values."""
    with quiet_transformers(), torch.device("meta"):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            return model_class(config).from_config(config, trust_remote_code=trust_remote_code)
        except FILE_FAULTS as error:
            raise ModelError(f"{folder}: transformers cannot make a model of its config.json ({error})") from error


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))
