"""kill -9 of the board while a run trains: the run goes on, the next board finds it, no point is lost or twice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.board.running import Program, start_program

SETTINGS = {
    "name": "kept",
    "values": {
        "model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "data.batch_size": 4, "max_steps": 100000,
        "logging_steps": 1, "data.max_samples": 100,
    },
}  # fmt: skip


class Page:
    """What an open page does: it keeps its cookie and the position of its stream, and asks again when it breaks off."""

    def __init__(self, program: Program) -> None:
        address = urlsplit(program.address)
        self.base = f"{address.scheme}://{address.netloc}"
        self.http = httpx.Client(base_url=self.base, headers={"Origin": self.base}, timeout=30, trust_env=False)
        self.http.get(program.address)
        self.steps: list[int] = []
        self.position = ""
        self.anew = 0

    def read(self, name: str) -> None:
        found = self.http.get(f"/api/runs/{name}/curves").json()
        self.position = found["position"]
        self.steps = [int(step) for step in found["jobs"].get("default", {}).get("steps", [])]

    def listen(self, name: str, until: int) -> None:
        """Until so many points are there, or the stream breaks off."""
        headers = {"Last-Event-ID": self.position} if self.position else {}
        with self.http.stream("GET", f"/api/runs/{name}/live", headers=headers) as stream:
            kind = event_id = ""
            for line in stream.iter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    event_id = value
                elif field == "event":
                    kind = value
                elif field == "data" and kind == "points":
                    self._take(json.loads(value), event_id)
                elif field == "data" and kind == "anew":
                    self.anew += 1
                    self.read(name)
                if len(self.steps) >= until:
                    return

    def _take(self, points: list[dict[str, Any]], event_id: str) -> None:
        """As run.js: what the stream says may be of another file, or partly known from a reading in between."""
        file, _, had = self.position.partition("-")
        if event_id.partition("-")[0] == file:
            self.steps += [int(point["step"]) for point in points if point["end"] > int(had)]
            self.position = event_id

    def state(self, name: str) -> str:
        return self.http.get(f"/part/runs/{name}/head").text.partition('data-state="')[2].partition('"')[0]

    def until(self, name: str, *states: str, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while (state := self.state(name)) not in states:
            assert time.monotonic() < end, f"still {state}"
            time.sleep(0.1)
        return state


def test_a_run_outlives_its_board_and_an_open_page_goes_on(tmp_path: Path) -> None:
    program = start_program(tmp_path)
    page = Page(program)
    try:
        waiting = page.http.post("/api/draft/start", json=SETTINGS).json()
        second = page.http.post("/api/draft/start", json={**SETTINGS, "name": "kept"}).json()
        assert (waiting["name"], second["name"]) == ("kept", "kept-2")
        page.read("kept")
        while len(page.steps) < 5:
            page.listen("kept", 5)
        program.kill()
        with pytest.raises(httpx.TransportError):
            page.http.get("/health")
        before = len((tmp_path / "runs/kept/metrics.jsonl").read_text("utf-8").splitlines())
        port = urlsplit(program.address).port
        assert port is not None
        program = start_program(tmp_path, port)
        page.listen("kept", len(page.steps) + 5)
        assert page.state("kept") == "running"
        assert page.state("kept-2") == "waiting"
        assert len((tmp_path / "runs/kept/metrics.jsonl").read_text("utf-8").splitlines()) > before
        assert page.steps == list(range(1, len(page.steps) + 1))
        assert page.anew <= 1  # the file was there anew when the run began

        page.http.post(f"/api/tasks/{second['task']}/stop", json={})
        page.http.post("/api/runs/kept/stop", json={})
        assert page.until("kept", "stopped", "done", "died", "failed") == "stopped"
        assert page.state("kept-2") == "stopped"
        assert list((tmp_path / "runs/kept/checkpoints").iterdir())
    finally:
        page.http.close()
        program.kill()
        _end(tmp_path)


def _end(folder: Path) -> None:
    from lowrank.board.places import Places
    from lowrank.board.state import Board
    from tests.board.running import end_children

    end_children(Board(Places(folder)))
