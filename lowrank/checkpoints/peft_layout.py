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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints import adalora_files
from lowrank.checkpoints.atomic import current, new_folder
from lowrank.checkpoints.model_card import model_card
from lowrank.checkpoints.peft_config import BaseDescription, Description, as_pattern, from_peft, peft_trouble, to_peft
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.errors import ModelError, raise_all

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l"
    r"|miss_block|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_R\.weight)"
)
_OF_ADAPTERS = re.compile(r"(^|\.)(lora|vera|ia3|hada|lokr|oft|miss)_")
_BEGINNINGS = {"LORA": "lora_", "VERA": "vera_", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "OFT": "oft_",
               "MISS": "miss_"}  # fmt: skip
_MAGNITUDE = "lora_magnitude_vector"
_SHARED = ("vera_A", "vera_B")
"""What all layers of an adapter share; PEFT puts it beside the model, under `base_model.`."""
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


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
    right only if the base has the same: `check_base_tensors`."""
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
    also: Callable[[Path], Any] | None = None,
) -> None:
    """Write `adapter` to `folder`, whole or not at all, instead of what was there.

    `copies`: full names of the modules trained whole, if `adapter.config` has them abbreviated. `dtype`: of the
    tensors in the file; None keeps theirs. `also` may write more files into the folder (a tokenizer).
    """
    with new_folder(folder) as partial:
        write_adapter(partial, adapter, base, copies=copies, dtype=dtype, task_type=task_type)
        num_parameters = sum(map(torch.numel, adapter.tensors.values()))
        trouble = peft_trouble(base, adapter.targets, adapter.config.peft_type)
        where = f"on {len(adapter.targets)} modules of" if adapter.targets else "before every document for"
        card = model_card(adapter.config, where, num_parameters, base.name, trouble)
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
    copies = adapter.copies if copies is None else copies
    fields = to_peft(adapter.config, adapter.targets, copies, base, task_type)
    of_tokens = [name for name in adapter.tensors if name.endswith(TOKEN_ROWS)]
    if of_tokens:
        ids = list(adapter.config.trainable_token_indices)
        fields["trainable_token_indices"] = {name.removesuffix(f".{TOKEN_ROWS}"): ids for name in of_tokens}
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    in_file = _names_in_file([name for name in adapter.targets if name in adapter.config.target_parameters], base)
    tensors = {
        name if name == TABLE else f"{PREFIX}{_renamed(name, in_file)}": value
        for name, value in adapter.tensors.items()
    }
    write_tensors(folder / TENSOR_FILE, tensors, dtype)


def load_adapter(folder: Path) -> AdapterOnDisk:
    """Read an adapter that lowrank or PEFT wrote. Tensors come on the CPU, in float32 or wider.

    Raises ModelError with everything in it that is missing, does not fit, or is not supported.
    """
    folder = current(Path(folder))
    problems: list[str] = []
    fields, stored = _read_config(folder), _read_tensors(folder)
    if fields.get("peft_type") == adalora_files.KIND:
        fields, stored = adalora_files.as_lora(fields, stored)
    description = from_peft(fields, problems)
    if description is None:
        raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
        raise AssertionError("no description without problems")
    if issubclass(description.variant, PromptSettings):
        return _load_prompt(folder, description, stored, problems)
    shared = {key: stored.pop(f"base_model.{key}") for key in _SHARED if f"base_model.{key}" in stored}
    problems += [
        f"{name}: names in {TENSOR_FILE} begin with {PREFIX!r}" for name in stored if not name.startswith(PREFIX)
    ]
    tensors = {name.removeprefix(PREFIX): _widened(value) for name, value in stored.items()}
    parameters = _parameters_in_file(tensors, description.target_parameters)
    tensors = {_renamed(name, parameters): value for name, value in tensors.items()}
    token_rows = {name: value for name, value in tensors.items() if name.endswith(TOKEN_ROWS)}
    problems += [
        f"{name}: {len(value)} rows, expected {len(description.token_ids)} by {CONFIG_FILE}"
        for name, value in token_rows.items()
        if len(value) != len(description.token_ids)
    ]
    if description.token_ids and not token_rows:
        problems.append(f"trainable_token_indices: {TENSOR_FILE} holds no {TOKEN_ROWS}")
    tensors = {name: value for name, value in tensors.items() if name not in token_rows}
    parts, copied, rest = _sorted_out(tensors, description)
    fused = set(parameters.values())
    for module, own in parts.items():
        problems += _misfits(module, own, description, fused=module in fused)
    problems += [f"{name}: no kind of tensor that lowrank knows" for name in rest if _OF_ADAPTERS.search(name)]
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
    kind = description.variant.peft_type
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


def check_base_tensors(adapter: AdapterOnDisk, base_tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError if a base weight in the adapter's file differs from the base's own, given by name.

    It does where tokens were added before training; the adapter then fits only the base so resized.
    """
    problems = []
    for name, saved in adapter.base_tensors.items():
        own = base_tensors.get(name)
        if own is None:
            problems.append(f"{name}: neither part of the adapter nor of the base")
        elif own.shape != saved.shape:
            problems.append(f"{name}: shape {tuple(saved.shape)} in the adapter's file, {tuple(own.shape)} in the base")
        elif not torch.equal(own.detach().cpu(), saved.to(own.dtype)):
            problems.append(f"{name}: other values in the adapter's file than in the base")
    heading = "this adapter was trained on another base; use the base it was saved with, tokens added"
    raise_all(ModelError, heading, problems)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: no {CONFIG_FILE} in it, so it is no adapter in PEFT's layout")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return fields


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSOR_FILE
    if path.is_file():
        return read_tensors(path)
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder}: only adapter_model.bin, a pickle, which can run code when it is opened; lowrank does not. If "
            "you trust it, load it with peft.PeftModel.from_pretrained and save_pretrained it again"
        )
    raise ModelError(f"{folder}: no {TENSOR_FILE} in it")


def _names_in_file(parameters: Sequence[str], base: BaseDescription) -> dict[str, str]:
    """PEFT wraps a module of experts once for each adapted parameter, in the model's order, the first innermost."""
    names, by_module = {}, {}
    for name in sorted(parameters, key=lambda name: _place(name, base.expert_parameters)):
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, own in by_module.items():
        for depth, name in enumerate(reversed(own)):
            names[name] = module + ".base_layer" * depth
    return names


def _parameters_in_file(tensors: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, str]:
    """The inverse: {module in the file: parameter}. Files do not say the order; it is the same in all models."""
    found: dict[str, str] = {}
    for item in wanted:
        ending = item.rpartition(".")[0]
        own = sorted(
            {other for other in wanted if other.rpartition(".")[0] == ending}, key=lambda name: _place(name, ())
        )
        for name in tensors:
            match = _PART.fullmatch(name)
            module = match["module"] if match else ""
            plain, depth = module.replace(".base_layer", ""), module.count(".base_layer")
            if module and (plain == ending or plain.endswith(f".{ending}")) and depth < len(own):
                found[module] = f"{plain}.{own[-1 - depth].rpartition('.')[2]}"
    return found


def _place(name: str, order: Sequence[str]) -> tuple[int, bool]:
    return (order.index(name) if name in order else 0), name.endswith("down_proj")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    match = _PART.fullmatch(name)
    return f"{names[match['module']]}.{match['part']}" if match and match["module"] in names else name


def _sorted_out(
    tensors: Mapping[str, torch.Tensor], description: Description
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str], list[str]]:
    """(an adapter's parts by module, copied module by tensor name, names of all other tensors)."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    copied: dict[str, str] = {}
    rest: list[str] = []
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        copy = _copied_module(name, description)
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif copy is not None:
            copied[name] = copy
        else:
            rest.append(name)
    return parts, copied, rest


def _copied_module(name: str, description: Description) -> str | None:
    """The module a tensor of modules_to_save belongs to, by PEFT's rule: a module whose name ends with an entry."""
    if ".base_layer." in name or _OF_ADAPTERS.search(name):
        return None
    module = name.rpartition(".")[0]
    if description.tied and description.modules_to_save and name.endswith(".weight"):
        return module  # the other end of a tied pair is saved, but not listed
    while module:
        if module.endswith(description.modules_to_save):
            return module
        module = module.rpartition(".")[0]
    return None


def _misfits(module: str, own: Mapping[str, torch.Tensor], description: Description, *, fused: bool) -> list[str]:
    problems = []
    rank, _ = description.target(module)
    kind, is_dora = description.variant.peft_type, "use_dora" in description.variant.peft_fields
    for name in own:
        if not name.startswith(_BEGINNINGS[kind]) or (name == _MAGNITUDE and not is_dora):
            problems.append(f"{module}.{name}: no kind of tensor of a {kind} adapter with this {CONFIG_FILE}")
    if is_dora and "lora_A.weight" in own and _MAGNITUDE not in own:
        problems.append(f"{module}.{_MAGNITUDE}: missing, though use_dora is set")
    for name_A, name_B in _PAIRS:
        if name_A not in own and name_B not in own:
            continue
        problems += [f"{module}.{name}: missing" for name in (name_A, name_B) if name not in own]
        for name, axis in ((name_A, 0), (name_B, 1)):
            if name not in own:
                continue
            fits = own[name].ndim == 2 and (
                own[name].shape[axis] % rank == 0 if fused else own[name].shape[axis] == rank
            )
            if not fits:
                shape = tuple(own[name].shape)
                expected = f"({rank}, ...)" if axis == 0 else f"(..., {rank})"
                problems.append(f"{module}.{name}: shape {shape}, expected {expected} by {CONFIG_FILE}")
    return problems


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
    if "feedforward_modules" in description.variant.model_fields:  # the tensors say it
        settings["feedforward_modules"] = tuple(name for name, own in parts.items() if own["ia3_l"].shape[0] == 1)
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
