"""Run folders as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank.search.candidates import first_candidates
from lowrank.search.config import SweepConfig
from lowrank.search.ranking import write_table
from lowrank.search.sweep import Sweep
from tests.board.running import Running
from tests.board.test_curves import held_out, step


def write_run(running: Running, name: str, points: int = 40, job: str = "default") -> Path:
    """A run folder as a run leaves it."""
    folder = running.board.places.runs / name
    folder.mkdir()
    jobs = {
        job: {
            "description": "lora r=16", "steps": points, "num_steps": points, "last_loss": 1.0, "best_eval": None,
            "verdict": {"kind": "falling", "sentence": "Still falling."},
        }
    }  # fmt: skip
    summary = {
        "jobs": jobs,
        "interrupted": False,
        "peak_memory_bytes": 5e8,
        "tokens_per_second": 100.0,
        "train_tokens": 5,
    }
    config = {"model": {"path": "lowrank/tiny"}, "adapter": {"rank": points}, "output_dir": f"runs/{name}"}
    lines = [step(job, number, 2 + 1 / (number + 1)) for number in range(points)] + [held_out(job, points - 1, 2.0)]
    for file, content in ((".lowrank.json", {"owned": [job]}), ("config.json", config), ("summary.json", summary)):
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_sweep(folder: Path) -> None:
    """As a run writes it, with a candidate that was left behind."""
    values = [{"adapter.rank": rank, "optimizer.learning_rate": rate} for rank in (4, 64) for rate in (1e-4, 1e-3)]
    settings = SweepConfig(candidates=tuple(values))
    sweep = Sweep(settings, first_candidates(settings), "loss")
    for place, trial in enumerate(sweep.trials.values()):
        trial.step, trial.num_steps, trial.finished = 40 - 10 * place, 40, "pruned" if place else "done"
        trial.loss = trial.best = 1.5 + place / 5
        trial.rows = [[trial.loss / 8 + row / 100 for row in range(-4, 5) if row], [1 / 8] * 8]
    write_table(sweep, folder)
