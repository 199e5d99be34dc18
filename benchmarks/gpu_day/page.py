"""The page made of a day's JSON."""

from __future__ import annotations

from typing import Any


def page(result: dict[str, Any]) -> str:
    """Markdown: what was measured so far."""
    found = result.get("environment", {})
    lines = [
        f"# {found.get('gpu', found.get('cpu', 'a machine'))}, {found.get('date', '')}",
        "",
        f"Versions: {found.get('versions', {})}. There: {', '.join(found.get('there', []))}.",
    ]
    if "tests" in result:
        tests = result["tests"]
        last = (tests["output"].strip().splitlines() or [""])[-1]
        lines += ["", f"Tests: exit {tests['exit']} after {tests['seconds']:.0f} s: {last}"]
    lines += _table("The device and our kernels", result.get("kernels", []), _kernel)
    lines += _table("Training", result.get("training", []), _training)
    lines += _table("Plan and measured memory", result.get("plans", []), _plan)
    lines += _table("Longest document on a card of 24 GB", result.get("longest", []), _longest)
    lines += _table("Answering", result.get("decoding", []), _decoding)
    lines += _table("Answering through compiled layers, 0.5B", result.get("compiled", []), _compiled)
    lines += _table("In processes of their own, 0.5B", result.get("processes", []), _processes)
    for each in result.get("profiles", []):
        title = f"Profile: {each['shape']}, {each['storage']}, {each['jobs']} jobs of {each['tokens']} tokens"
        summary = f"{each['seconds']:.3f} s, device busy {each['busy_share']:.0%}, {each['launches']} launches, "
        summary += f"{each['synchronizations']} synchronizations, {1e3 * each['gap_seconds']:.1f} ms of gaps"
        lines += ["", f"## {title}", "", summary, ""]
        lines += ["| kernel | times | ms |", "|---|---|---|"]
        lines += [f"| `{top['name']}` | {top['count']} | {1e3 * top['seconds']:.2f} |" for top in each["top"]]
        if each["gaps"]:
            lines += ["", "| the device waits after | before | ms |", "|---|---|---|"]
            lines += [f"| `{gap['after']}` | `{gap['before']}` | {1e3 * gap['seconds']:.3f} |" for gap in each["gaps"]]
    for name in ("notes", "failures"):
        if result.get(name):
            lines += ["", f"## {name.capitalize()}", "", *[f"* {each}" for each in result[name]]]
    return "\n".join(lines)


def _processes(row: dict[str, Any]) -> dict[str, Any]:
    return {
        who: f"{each['tokens_per_second']:.0f} tokens/s, {each['peak_memory_bytes'] / 1e9:.1f} GB"
        for who, each in row.items()
    }


def _table(title: str, rows: list[dict[str, Any]], show: Any) -> list[str]:
    if not rows:
        return []
    shown = [show(row) for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    head = ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in shown]]


def _kernel(row: dict[str, Any]) -> dict[str, Any]:
    found = {"what": row["what"], "ms": "", "rate": ""}
    if "seconds" in row:
        found["ms"] = f"{1e3 * row['seconds']:.3f}"
    if "flops_per_second" in row:
        found["rate"] = f"{row['flops_per_second'] / 1e12:.1f} TFLOP/s"
    if "bytes_per_second" in row:
        found["rate"] = f"{row['bytes_per_second'] / 1e9:.0f} GB/s"
    if "faster_than_plain_torch" in row:
        found["beside plain torch"] = f"{row['faster_than_plain_torch']:.1f} times, same bits: {row['same_bits']}"
    return found


def _training(row: dict[str, Any]) -> dict[str, Any]:
    cell = row["cell"]
    speeds, peaks = row.get("tokens_per_second", {}), {}
    for who, turns in row["turns"].items():
        peaks[who] = next((turn["peak_memory_bytes"] for turn in turns if turn.get("peak_memory_bytes")), None)
        failed = next((turn["failed"] for turn in turns if "failed" in turn), None)
        if failed and who not in speeds:
            speeds = {**speeds, who: failed}
    shown = {
        "shape": cell["shape"], "storage": cell["storage"], "jobs": cell["jobs"], "tokens of a job": cell["tokens"],
        "recompute": cell["recompute"],
    }  # fmt: skip
    for who in ("lowrank", "trl", "trl_liger"):
        speed, peak = speeds.get(who, ""), peaks.get(who)
        shown[who] = f"{speed:.0f} tokens/s" if isinstance(speed, float) else speed
        shown[who] += f", {peak / 1e9:.1f} GB" if peak else ""
    last = [turn["steps"][-1] for turn in row["turns"].get("lowrank", []) if turn.get("steps")]
    if last and last[-1].get("device_allocations"):
        shown["asked the driver for memory in the last step"] = last[-1]["device_allocations"]
    if "share_of_products" in row:
        shown["share of the products"] = f"{row['share_of_products']:.0%}"
    return shown


def _plan(row: dict[str, Any]) -> dict[str, Any]:
    measured = row["measured"]
    return {
        "shape": row["shape"], "storage": row["storage"], "tokens": row["tokens"], "recompute": row["recompute"],
        "plan": f"{row['predicted'] / 1e9:.2f} GB",
        "measured": f"{measured / 1e9:.2f} GB" if measured else "not told",
        "error": f"{row['error']:+.1%}" if measured else "",
    }  # fmt: skip


def _longest(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("shape", "storage", "recompute", "tokens", "does_not_fit")} | {
        "capped": "yes" if row["memory"] else "no"
    }


def _decoding(row: dict[str, Any]) -> dict[str, Any]:
    speeds = {name: f"{speed:.0f} tokens/s" for name, speed in row["tokens_per_second"].items()}
    return {key: row[key] for key in ("shape", "storage", "adapters", "rows")} | speeds


def _compiled(row: dict[str, Any]) -> dict[str, Any]:
    speeds = {name: f"{speed:.0f} tokens/s" for name, speed in row["tokens_per_second"].items()}
    return {key: row[key] for key in ("storage", "rows", "adapters")} | speeds | {"not used": row["problem"] or ""}
