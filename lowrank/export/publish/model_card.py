"""README.md of an export: what it is, what it was made of, how it was checked, how it is run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lowrank import __version__
from lowrank.checkpoints.model_card import pipeline_tag
from lowrank.export.source import Source
from lowrank.export.verify.compare import Comparison


def card(source: Source, kind: str, usage: str, comparisons: Sequence[Comparison], notes: Sequence[str]) -> str:
    """Markdown with the metadata that the Hugging Face hub reads; nothing in it that is not known."""
    parts = [
        _front(kind, source),
        f"# {source.name}\n",
        _made_of(source, notes),
        f"## How to run it\n\n{usage}\n",
    ]
    if comparisons:
        parts.append(_checked(comparisons))
    return "\n".join(parts)


def _front(kind: str, source: Source) -> str:
    base = source.hub_base
    library = "peft" if kind == "peft" else "gguf" if "gguf" in kind or kind == "ollama" else "transformers"
    lines = [
        f"library_name: {library}",
        f"pipeline_tag: {pipeline_tag(source.supports_images, is_reward_model=source.is_reward_model)}",
    ]
    if base is not None:  # the hub refuses a card whose base_model is a path
        lines.append(f"base_model: {base}")
    lines.append(
        "tags:\n- lowrank"
        + ("\n- lora" if kind == "peft" else "")
        + ("\n- reward-model" if source.is_reward_model else "")
    )
    return "---\n" + "\n".join(lines) + "\n---\n"


def _made_of(source: Source, notes: Sequence[str]) -> str:
    facts = source.facts
    base = source.hub_base or os.path.basename(str(facts.get("base") or source.model.path).rstrip("/\\"))
    lines = [f"- **base**: `{base}`"]
    if facts.get("data"):
        lines.append("- **data**: " + ", ".join(f"`{os.path.basename(str(path))}`" for path in facts["data"]))
    for adapter in facts.get("adapters", ()):
        lines.append(f"- **training**: {_method(adapter, facts)}")
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, f"- trained and exported with lowrank {__version__}\n"])


def _method(adapter: dict[str, object], facts: object) -> str:
    objective = facts.get("objective") if isinstance(facts, dict) else None
    kind = "all parameters" if adapter["type"] is None else f"{adapter['type']} of rank {adapter['rank']}"
    described = [f"{objective}, {kind}"]
    if adapter.get("steps"):
        described.append(f"{adapter['steps']} steps")
    if isinstance(adapter.get("train_tokens"), int):
        described.append(f"{adapter['train_tokens']:,} tokens")
    if isinstance(adapter.get("held_out_loss"), float):
        described.append(f"held-out loss {adapter['held_out_loss']:.4f}")
    return ", ".join(described)


def _checked(comparisons: Sequence[Comparison]) -> str:
    lines = [
        "## Compared with base + adapter\n",
        "| | tokens | mean KL | same likeliest token | perplexity | same greedy answers |",
        "|---|---|---|---|---|---|",
    ]
    for each in comparisons:
        lines.append(
            f"| {each.name} | {each.tokens} | {each.mean_kl:.2g} | {each.top1_agreement:.1%} "
            f"| {each.perplexity:.4g} (trained: {each.reference_perplexity:.4g}) "
            f"| {each.greedy_same} of {each.greedy_prompts} |"
        )
    return "\n".join(lines) + "\n"
