"""How quickly the board answers while a run trains, and how long a run of 100,000 points takes to open in Chromium.

    python -m benchmarks.board_pages [--requests 40] [--points 100000]

Needs the `board` extra; the second part Chromium and playwright. Prints milliseconds: median, 95 % and the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.board.running import Running, board_on

PAGES = (
    "/",
    "/new",
    "/data",
    "/runs/trains",
    "/part/runs/trains/head",
    "/part/runs/trains/details",
    "/api/runs/trains/curves",
    "/compare?run=trains",
)
SETTINGS = {
    "name": "trains",
    "values": {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "max_steps": 100000, "logging_steps": 1},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--points", type=int, default=100_000)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, board_on(Path(folder)) as running:
        pages_while_training(running, given.requests)
        print(f"the process: {psutil.Process().memory_info().rss / 1e6:.0f} MB, with this benchmark's client")
        if shutil.which("chromium"):
            many_points(running, given.points)


def pages_while_training(running: Running, requests: int) -> None:
    """Every page, again and again, in turns; while the device is busy, and after that, on the same run."""
    with running.client() as http:
        http.post("/api/draft/start", json=SETTINGS)
        while not http.get("/api/runs/trains/curves").json()["jobs"]:
            time.sleep(0.2)
        busy = times(http, requests)
        http.post("/api/runs/trains/stop", json={})
        while running.board.queue.running():
            time.sleep(0.2)
        idle = times(http, requests)
        for path in PAGES:
            print(f"{path:34} {spread(busy[path])}   after the run: {spread(idle[path])}")


def times(http: Any, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each page."""
    took: dict[str, list[float]] = {path: [] for path in PAGES}
    for _ in range(requests):
        for path in PAGES:
            begun = time.perf_counter()
            assert http.get(path).status_code == 200
            took[path].append(1000 * (time.perf_counter() - begun))
    return took


def many_points(running: Running, points: int) -> None:
    """From the request to the drawn curve, the file read anew each time."""
    from tests.board.browser import opened, page_of

    folder = running.board.places.runs / "long"
    folder.mkdir()
    (folder / ".lowrank.json").write_text('{"owned": ["a"]}', encoding="utf-8")
    line = {"event": "step", "job": "a", "step": 0, "epoch": 0.1, "loss": 1.5, "grad_norm": 1.0, "learning_rate": 1e-4}
    more = {"tokens": 900, "loss_tokens": 400.0, "seconds": 0.4, "skipped": False, "metrics": {}, "time": 1.0}
    lines = (json.dumps({**line, "step": number, "loss": 3 / (number + 1), **more}) + "\n" for number in range(points))
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    took: list[float] = []
    with opened() as browser, page_of(browser, running) as page:
        for _ in range(7):
            running.board.curves._kept.clear()
            page.goto(f"{running.url}/runs/long")
            page.locator(".uplot canvas").wait_for()
            took.append(drawn(page))
    print(f"{points:,} points, opened:            {spread(took)}")


def drawn(page: Any) -> float:
    """Milliseconds from the request of the page to the first curve."""
    while True:
        marks = page.evaluate("performance.getEntriesByName('drawn').map((one) => one.startTime)")
        if marks:
            return marks[0]
        time.sleep(0.02)


def spread(took: list[float]) -> str:
    """In milliseconds."""
    ordered = sorted(took)
    return f"{statistics.median(took):6.0f} {ordered[int(0.95 * (len(took) - 1))]:6.0f} {ordered[-1]:6.0f} ms"


if __name__ == "__main__":
    main()
