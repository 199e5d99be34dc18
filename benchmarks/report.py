"""A result file as a page a person reads."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The markdown of a train_vs_trl result."""
    machine, work = result["machine"], result["workload"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# lowrank and TRL, {result['date']}",
        "",
        f"{where}; {', '.join(machine['bf16_instructions']) or 'no bf16 instructions'}. {versions}.",
        "",
        f"{work['parameters'] / 1e6:.0f} M parameters, random weights, LoRA r={work['rank']} on all linear layers, "
        f"{work['rows']}; {work['rounds']} rounds of {work['steps']} steps, the first of each not counted.",
        "",
        "| | tokens/s | tokens per CPU second | tokens per step | peak memory | loss | gradient norm | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["contenders"].items():
        lines.append(
            f"| {name} | {found['tokens_per_second']:.0f} | {found['tokens_per_cpu_second']:.0f} "
            f"| {found['tokens_per_step']:.0f} | {found['peak_memory_bytes'] / 1e9:.2f} GB "
            f"| {found['loss'][0]:.3f} to {found['loss'][-1]:.3f} "
            f"| {min(found['grad_norm']):.2f} to {max(found['grad_norm']):.2f} | {found['load']:.1f} |"
        )
    lines += ["", "| ratio of medians | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["ratios"].items()]
    dtype = result["workload"].get("dtype", "bfloat16")
    lines += ["", f"The model's own matrix products by themselves, {dtype}, forward and backward, between the rounds:"]
    for unit in ("second", "cpu_second"):
        rates = sorted(each[f"flops_per_{unit}"] / 1e12 for each in result["gemm"])
        lines.append(f"{rates[0]:.2f} to {rates[-1]:.2f} TFLOP per {unit.replace('_', ' ')}.")
    for name, share in result.get("share_of_gemm_limit", {}).items():
        lines.append(f"lowrank reaches {share:.0%} of that limit ({name.replace('_', ' ')}).")
    lines += ["", "| resolved configuration | |", "|---|---|"]
    for name, found in result["contenders"].items():
        lines.append(f"| {name} | {_flat(found['config'])} |")
    return "\n".join(lines) + "\n"


def _flat(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_flat(value) if isinstance(value, dict) else value}" for key, value in config.items())
