"""Checks that an adapter fits a model and the adapters that it has already."""

from __future__ import annotations

from typing import Any

from lowrank.adapters.expert_lora import why_not
from lowrank.adapters.targets import Targets, innermost, is_of_one_expert, is_row_by_row, name_of
from lowrank.adapters.variants import AdapterConfig
from lowrank.models.storages.dense import DenseLinear


def target_problems(
    model: Any, config: AdapterConfig, targets: Targets, copied: set[str], adapted: set[str]
) -> list[str]:
    """Why an adapter cannot be attached, one sentence each. `copied`, `adapted`: modules that other slots train whole,
    or have adapters on."""
    head = name_of(model, model.get_output_embeddings())
    problems = []
    if head in targets.linears and config.dropout:
        problems.append(f"adapter.dropout does not reach {head}, which is a target: set it to 0 or leave {head} out")
    special = [name for name in targets.linears if name == head] + list(targets.embeddings)
    if special and not config.reaches_heads:
        problems.append(
            f"adapter.type {config.type} reaches neither heads nor embeddings: leave {', '.join(special)} out, or "
            "use lora or rslora"
        )
    problems += _expert_problem(model, config, targets)
    if config.needs_quantized and not any(_is_packed(model, name) for name in targets.linears):
        problems.append(
            f"adapter.type {config.type} makes up for what quantization lost, and model.storage.type dense loses "
            "nothing; use lora, or quantize the base"
        )
    if targets.adapts_tower and config.needs_calibration:
        problems.append(
            f"adapter.type {config.type} begins from what data does to the layers, and looks at text alone: leave "
            "tower and projector out, or use lora"
        )
    of_tokens: set[str] = set()
    if config.trainable_token_indices:
        of_tokens = {head, name_of(model, model.get_input_embeddings())}
        problems += [
            f"trainable_token_indices: {name} is in target_modules or modules_to_save too; use one of them"
            for name in sorted(of_tokens & {*targets.linears, *targets.embeddings, *targets.copies})
        ]
    both = {*targets.linears, *targets.embeddings} & set(targets.copies)
    if both:
        problems.append(f"both in target_modules and modules_to_save: {', '.join(sorted(both))}")
    for name in targets.copies:
        module = model.get_submodule(name)
        if not is_row_by_row(module):
            kind = type(module).__name__
            problems.append(f"modules_to_save: {name} is a {kind}; name linear layers, embeddings or norms in it")
    # One wrapper per linear layer: it is adapted for all slots or a copy for all slots.
    clash = ((set(targets.linears) | (of_tokens & {head})) & copied) | (set(targets.copies) & adapted)
    problems += [f"{name}: one job adapts it and another trains a copy; use one of the two" for name in sorted(clash)]
    return problems


def _is_packed(model: Any, name: str) -> bool:
    """The layer was packed as it loaded."""
    layer = innermost(model.get_submodule(name))
    return hasattr(layer, "dense_weight") and not isinstance(layer, DenseLinear)


def _expert_problem(model: Any, config: AdapterConfig, targets: Targets) -> list[str]:
    problems = [
        f"{name} is a layer of one expert and sees only the tokens that chose it, so it cannot carry an adapter; "
        "leave it out of target_modules"
        for name in targets.linears
        if is_of_one_expert(name)
    ]
    if not targets.parameters:
        return problems
    for name in targets.parameters:
        module, _, key = name.rpartition(".")
        reason = why_not(innermost(model.get_submodule(module)), key)
        problems += [f"target_parameters: {name}: {reason}"] if reason else []
    if not config.reaches_heads:
        problems.append(f"target_parameters: adapter.type {config.type} does not reach them; use lora or rslora")
    if config.dropout:
        problems.append("target_parameters: dropout does not reach fused experts (nor in PEFT): set it to 0")
    return problems
