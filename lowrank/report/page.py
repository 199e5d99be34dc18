"""`report.html`: everything about a run on one page that needs nothing else, not even a network.

It is written from what lies in the run folder: config.json, summary.json, metrics.jsonl, data_report.json, and what
`lowrank predict` and `lowrank eval` left there. Whatever is missing is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import CONFIG, METRICS, SWEEP_TABLE
from lowrank.errors import OutputError
from lowrank.foreign_files import find_json
from lowrank.report import formatting
from lowrank.report.curves import lines_of, loss_chart, score_chart
from lowrank.report.measured import read_evaluations, read_predictions
from lowrank.report.reporters.metrics import read_metrics
from lowrank.report.summary import SUMMARY
from lowrank.report.sweep_view import fields, interval, parallel, result, short, shown

REPORT = "report.html"
DATA_REPORT = "data_report.json"
"""What the data doctor found, by job."""
_SAMPLES = 6
_LONGEST = 2000
"""Characters of one text that are shown."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder; its path. OutputError if no run lies there."""
    config, summary = find_json(folder / CONFIG), find_json(folder / SUMMARY)
    if config is None or summary is None:
        missing = CONFIG if config is None else SUMMARY
        raise OutputError(f"{folder} is no run that came to an end: there is no {missing} in it")
    metrics = read_metrics(folder / METRICS)
    lines = lines_of(metrics)
    sweep = find_json(folder / SWEEP_TABLE)
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            name=folder.name,
            config=config,
            settings=json.dumps(config, indent=2, ensure_ascii=False),
            summary=summary,
            losses=loss_chart(lines),
            scores=score_chart(lines),
            metric=next((line["metric"] for line in metrics if line.get("metric", "loss") != "loss"), ""),
            sweep=sweep,
            parallel=parallel(sweep) if sweep else None,
            memory=_memory(summary),
            data=_data(find_json(folder / DATA_REPORT) or {}),
            warnings=[line for line in metrics if line.get("event") == "notice" and line.get("level") == "warning"],
            predictions=read_predictions(folder / "predict", _SAMPLES),
            evaluations=read_evaluations(folder / "eval"),
        )
    )
    write_text(folder / REPORT, page)
    return folder / REPORT


@cache  # to compile the page takes longer than to fill it in
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowrank.report", ""),
        autoescape=True,  # what models say, and names, are text and never markup
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Any] = environment.filters  # jinja2 types it by its own alone
    filters.update(
        {
            "duration": formatting.duration,
            "memory": formatting.gigabytes,
            "count": formatting.count,
            "loss": formatting.loss,
            "rate": formatting.rate,
            "best": formatting.best,
            "short": _short,
            "shown": shown,
            "result": result,
            "interval": interval,
            "fields": fields,
            "field": short,
        }
    )
    return environment


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [... {len(text) - _LONGEST} more characters]"


def _memory(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan against what was used; widths are shares of the largest of them."""
    plan = summary.get("memory_plan")
    if not plan:
        return None
    device = summary.get("peak_device_memory_bytes")
    used = summary["peak_memory_bytes"] if device is None else device
    widest = max(plan["peak"], used, 1)
    parts = {**plan["step"], "process": plan["process"]}
    return {
        "parts": [(name, value, 100 * value / widest) for name, value in parts.items() if value],
        "planned": (plan["peak"], 100 * plan["peak"] / widest),
        "used": (used, 100 * used / widest),
        "available": plan["available"],
        "error": summary.get("prediction_error"),
        "device": plan["device"],
    }


def _data(reports: Mapping[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Reports with the jobs that share them."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for name, report in reports.items():
        for names, other in found:
            if other == report:
                names.append(name)
                break
        else:
            found.append(([name], report))
    return found
