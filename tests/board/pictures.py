"""The documentation's pictures, of real runs on the base that ships: `python -m tests.board.pictures FOLDER`.

FOLDER is the board's; runs that are there already are not made again. Needs Chromium.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tests.board.browser import opened, page_of
from tests.board.running import Running, board_on

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COMMON = {
    "model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "logging_steps": 1, "eval_steps": 0.2,
    "data.validation_split": 0.02, "data.batch_size": 2,
}  # fmt: skip
RUNS: tuple[dict[str, Any], ...] = (
    {
        "name": "three-ranks",
        "values": {**COMMON, "max_steps": 40, "optimizer.learning_rate": 4e-3},
        "jobs": [
            {"name": "r4", "adapter.rank": 4},
            {"name": "r16", "adapter.rank": 16},
            {"name": "r16-slow", "adapter.rank": 16, "optimizer.learning_rate": 5e-4},
        ],
    },
    {
        "name": "search",
        "values": {**COMMON, "max_steps": 16},
        "sweep": [
            {"path": "adapter.rank", "how": "values", "text": "4, 16, 64"},
            {"path": "optimizer.learning_rate", "how": "values", "text": "1e-3, 4e-3, 1e-2"},
        ],
    },
)


def main() -> None:
    """Train what is missing, then take the pictures in both languages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, default=IMAGES)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with board_on(given.folder) as running:
        with running.client() as http:
            for run in RUNS:
                if not (running.board.places.runs / run["name"]).exists():
                    http.post("/api/draft/start", json=run).raise_for_status()
        while running.board.queue.running() or running.board.queue.waiting():
            time.sleep(1)
        with opened() as browser:
            for language, suffix in (("en", ""), ("zh", ".zh-CN")):
                take(browser, running, given.images, language, suffix)


def take(browser: Any, running: Running, images: Path, language: str, suffix: str) -> None:
    """A run, a search, and the form of a new model."""
    with page_of(browser, running, language, color_scheme="light", device_scale_factor=1.5) as page:
        page.set_viewport_size({"width": 1180, "height": 820})
        for name, path in (("run", "/runs/three-ranks"), ("search", "/runs/search")):
            page.goto(running.url + path)
            page.locator(".uplot canvas").wait_for()
            page.locator("#plot-words", has_text="r").wait_for()
            page.evaluate("document.querySelector('#sweep-title')?.scrollIntoView()")
            page.wait_for_timeout(500)
            page.screenshot(path=images / f"board-{name}{suffix}.png")
        page.goto(f"{running.url}/new")
        page.locator('[data-model="lowrank/tiny"]').click()
        page.fill("#pick-data", "lowrank/demo")
        page.click("#add-data")
        page.locator("#look mark").first.wait_for()
        page.locator("#problems .good").wait_for()
        page.locator("#model-about").wait_for()
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.screenshot(path=images / f"board-new{suffix}.png")


if __name__ == "__main__":
    main()
