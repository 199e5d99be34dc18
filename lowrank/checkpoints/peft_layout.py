"""Adapters on disk, as PEFT keeps them: adapter_config.json beside adapter_model.safetensors.

Tensors are named as in the bank; the files put `base_model.model.` in front. Letters: R rank, D in-features,
O out-features, V vocabulary.

    <module>.lora_A.weight (R, D)         <module>.lora_B.weight (O, R)          an adapted linear layer
    <module>.lora_embedding_A (R, V)      <module>.lora_embedding_B (D, R)       an adapted embedding
    <module>.lora_magnitude_vector (O)                                           DoRA
    <module>.vera_lambda_b (O)            <module>.vera_lambda_d (R)             VeRA; maybe vera_A, vera_B
    <module>.ia3_l, hada_w1_a ..., lokr_w1 ..., oft_R.weight                     (IA)^3, LoHa, LoKr, OFT
    <experts>.lora_A.weight (R E, D)      <experts>.lora_B.weight (O, R E)       fused experts: the last parameter
    <experts>.base_layer.lora_A.weight ...                                       the one before it
    <module>.weight ...                                                          a copy (modules_to_save)
    <module>.token_adapter.trainable_tokens_delta (N, D)                         rows of single tokens
    prompt_embeddings (K, W)                                                     virtual tokens, without the prefix
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints import adapterhub_files
from lowrank.checkpoints.adapter_folder import CONFIG_FILE, TENSOR_FILE
from lowrank.checkpoints.atomic import current, new_folder
from lowrank.checkpoints.model_card import model_card
from lowrank.checkpoints.peft_config import (
    BaseDescription,
    as_pattern,
    left_out_by_vllm,
    peft_incompatibility,
    to_peft,
)
from lowrank.checkpoints.peft_description import Description, as_read, from_peft
from lowrank.checkpoints.peft_tensors import (
    names_in_file,
    of_adapters,
    parameters_in_file,
    renamed,
    sorted_out,
    tensor_problems,
)
from lowrank.checkpoints.tensor_file import read_shapes, read_tensors, write_tensors
from lowrank.errors import ModelError, raise_all
from lowrank.foreign_files import read_json

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterOnDisk:
    """One adapter: its settings, its tensors and what it reaches. After loading, `config` names modules in full."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    """Trained tensors, by the bank's names."""
    targets: dict[str, tuple[int, float]]
    """Rank and alpha of every adapted module, by full name."""
    base_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of the base that PEFT put into the file because it saw an embedding adapted or resized. They are
    looked at with the base at hand: base_tensors.py."""
    base_name: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    """What a person should know about a loaded adapter."""

    @property
    def copies(self) -> tuple[str, ...]:
        """Full names of the modules trained whole."""
        return self.config.modules_to_save


def save_adapter(
    folder: Path,
    adapter: AdapterOnDisk,
    base: BaseDescription,
    *,
    copies: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = torch.float32,
    task_type: str = "CAUSAL_LM",
    is_reward_model: bool = False,
    also: Callable[[Path], Any] | None = None,
) -> None:
    """Write `adapter` to `folder`, whole or not at all, instead of what was there.

    `copies`: full names of the modules trained whole, if `adapter.config` has them abbreviated. `dtype`: of the
    tensors in the file; None keeps theirs. `is_reward_model`: for the model card. `also` may write more files into
    the folder (a tokenizer).
    """
    with new_folder(folder) as partial:
        write_adapter(partial, adapter, base, copies=copies, dtype=dtype, task_type=task_type)
        num_parameters = sum(map(torch.numel, adapter.tensors.values()))
        incompatible = peft_incompatibility(base, adapter.targets, adapter.config.peft)
        notes = [each for each in (incompatible, left_out_by_vllm(base, adapter.targets)) if each]
        where = f"on {len(adapter.targets)} modules of" if adapter.targets else "before every document for"
        if isinstance(adapter.config, BottleneckSettings):
            where = "between the layers of"
        card = model_card(adapter.config, where, num_parameters, base, notes, is_reward_model=is_reward_model)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if also is not None:
            also(partial)


def write_adapter(
    folder: Path,
    adapter: AdapterOnDisk,
    base: BaseDescription,
    *,
    copies: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    task_type: str = "CAUSAL_LM",
) -> None:
    """The two files of an adapter, into a folder that someone else makes durable."""
    if isinstance(adapter.config, BottleneckSettings):
        fields = adapterhub_files.to_fields(adapter.config, adapter.tensors, base.name, base.revision)
        _write_fields(folder, fields)
        adapterhub_files.write_file(folder / adapterhub_files.TENSOR_FILE, adapter.tensors, dtype)
        return
    copies = adapter.copies if copies is None else copies
    fields = to_peft(adapter.config, adapter.targets, copies, base, task_type)
    fields |= adapter.config.fields_from_tensors(adapter.tensors.keys())
    of_tokens = [name for name in adapter.tensors if name.endswith(TOKEN_ROWS)]
    if of_tokens:
        ids = list(adapter.config.trainable_token_indices)
        fields["trainable_token_indices"] = {name.removesuffix(f".{TOKEN_ROWS}"): ids for name in of_tokens}
    _write_fields(folder, fields)
    in_file = names_in_file([name for name in adapter.targets if name in adapter.config.target_parameters], base)
    tensors = {
        _name_in_file(name, in_file, adapter.config.peft.shared): value for name, value in adapter.tensors.items()
    }
    write_tensors(folder / TENSOR_FILE, tensors, dtype)


def _write_fields(folder: Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _name_in_file(name: str, parameters: Mapping[str, str], shared: Collection[str]) -> str:
    if name == TABLE:
        return name
    return f"base_model.{name}" if name in shared else f"{PREFIX}{renamed(name, parameters)}"


def load_adapter(folder: Path) -> AdapterOnDisk:
    """Read an adapter that lowrank, PEFT or AdapterHub's library wrote. Tensors come on the CPU, in float32 or wider.

    Raises ModelError with everything in it that is missing, does not fit, or is not supported.
    """
    return _read(folder, read_tensors)


def read_adapter_header(folder: Path) -> AdapterOnDisk:
    """`load_adapter` without the tensors' values, which are on the device `meta`: for whoever asks for an adapter's
    base, settings, ranks or shapes. Raises the same."""
    return _read(folder, read_shapes)


def _read(folder: Path, read: Callable[[Path], dict[str, torch.Tensor]]) -> AdapterOnDisk:
    folder = current(Path(folder))
    problems: list[str] = []
    fields = _read_config(folder)
    if adapterhub_files.is_adapterhub(fields):
        config, own, base_name, revision = adapterhub_files.read(folder, fields, read)
        return AdapterOnDisk(config, own, {}, base_name=base_name, revision=revision)
    fields, stored = as_read(fields, read(_tensor_file(folder)))
    description = from_peft(fields, problems)
    if description is None:
        raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
        raise AssertionError("no description without problems")
    if issubclass(description.variant, PromptSettings):
        return _load_prompt(folder, description, stored, problems)
    shared = {
        key: stored.pop(f"base_model.{key}") for key in description.variant.peft.shared if f"base_model.{key}" in stored
    }
    problems += [
        f"{name}: names in {TENSOR_FILE} begin with {PREFIX!r}" for name in stored if not name.startswith(PREFIX)
    ]
    tensors = {name.removeprefix(PREFIX): _widened(value) for name, value in stored.items()}
    parameters = parameters_in_file(tensors, description.target_parameters)
    tensors = {renamed(name, parameters): value for name, value in tensors.items()}
    token_rows = {name: value for name, value in tensors.items() if name.endswith(TOKEN_ROWS)}
    problems += [
        f"{name}: {len(value)} rows, expected {len(description.token_ids)} by {CONFIG_FILE}"
        for name, value in token_rows.items()
        if len(value) != len(description.token_ids)
    ]
    if description.token_ids and not token_rows:
        problems.append(f"trainable_token_indices: {TENSOR_FILE} holds no {TOKEN_ROWS}")
    tensors = {name: value for name, value in tensors.items() if name not in token_rows}
    parts, copied, rest = sorted_out(tensors, description)
    fused = set(parameters.values())
    for module, own in parts.items():
        problems += tensor_problems(module, own, description, fused=module in fused)
    problems += [f"{name}: unknown tensor name" for name in rest if of_adapters().search(name)]
    if not parts and not copied and not token_rows:
        problems.append(f"{TENSOR_FILE} holds no tensor of an adapter")
    raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
    targets = {module: description.target(module) for module in parts}
    return AdapterOnDisk(
        config=_config(description, parts, targets, tuple(dict.fromkeys(copied.values())), tuple(sorted(fused))),
        tensors={**{name: value for name, value in tensors.items() if name not in rest}, **shared, **token_rows},
        targets=targets,
        base_tensors={name.replace(".base_layer.", "."): tensors[name] for name in rest},
        base_name=description.base_name,
        revision=description.revision,
        notes=_notes(description, tuple(copied.values())),
    )


def _load_prompt(
    folder: Path, description: Description, stored: Mapping[str, torch.Tensor], problems: list[str]
) -> AdapterOnDisk:
    """An adapter of virtual tokens: one table."""
    number = description.settings.get("num_virtual_tokens")
    kind = description.variant.peft.type
    problems += [f"{name}: a {kind} adapter has no such tensor" for name in stored if name != TABLE]
    if TABLE not in stored:
        problems.append(f"{TENSOR_FILE} holds no {TABLE}")
    elif stored[TABLE].ndim != 2 or len(stored[TABLE]) != number:
        problems.append(f"{TABLE}: shape {tuple(stored[TABLE].shape)}, expected ({number}, ...) by {CONFIG_FILE}")
    raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
    config = description.variant(**description.settings)
    return AdapterOnDisk(
        config, {TABLE: _widened(stored[TABLE])}, {}, base_name=description.base_name, revision=description.revision
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise ModelError(f"{folder}: no {CONFIG_FILE} in it, so it is no adapter in PEFT's layout")
    return read_json(path)


def _tensor_file(folder: Path) -> Path:
    path = folder / TENSOR_FILE
    if os.path.lexists(path):
        return path
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder}: only adapter_model.bin, a pickle, which can run code when it is opened; lowrank does not. If "
            "you trust it, load it with peft.PeftModel.from_pretrained and save_pretrained it again"
        )
    raise ModelError(f"{folder}: no {TENSOR_FILE} in it")


def _config(
    description: Description,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    targets: dict[str, tuple[int, float]],
    copies: tuple[str, ...],
    parameters: tuple[str, ...],
) -> AdapterConfig:
    modules = tuple(name for name in targets if name not in parameters)
    settings = {**description.settings, "target_modules": modules, "modules_to_save": copies}
    settings |= {"target_parameters": parameters} if parameters else {}
    settings |= {"trainable_token_indices": description.token_ids} if description.token_ids else {}
    settings |= description.variant.settings_from_tensors(parts)
    rank, alpha = description.general
    patterns = {
        "rank_pattern": as_pattern({name: rank for name, (rank, _) in targets.items()}, rank),
        "alpha_pattern": as_pattern({name: alpha for name, (_, alpha) in targets.items()}, float(alpha)),
    }
    return description.variant(**settings, **{name: pattern for name, pattern in patterns.items() if pattern})


def _notes(description: Description, copies: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    for item in description.modules_to_save:
        if not any(copy.endswith(item) for copy in copies):
            notes.append(f"modules_to_save: {item!r} has no tensor in {TENSOR_FILE}")
    if description.tied:
        notes.append("ensure_weight_tying: embedding and head were one tensor; trained further here, they are two")
    return tuple(notes)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
