"""Questions to the warm child: real answers, evil settings, the newest wins, nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lowrank.board import children
from lowrank.board.warm_worker import Superseded, WarmWorker
from tests.board.running import Running, board_on

BASE = {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"]}
REAL = {"start": children.start, "start_warm_worker": children.start_warm_worker}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]\n" for above, name in zip("abcdefgh", "bcdefghi")
)
"""Nine to the ninth texts, if somebody writes them out."""


@pytest.fixture(scope="module")
def running(shared: Running) -> Running:
    return shared


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx.Client]:
    with running.client() as client:
        client.timeout = httpx.Timeout(280)
        yield client


def test_every_error_stands_at_its_setting(http: httpx.Client) -> None:
    good: dict[str, Any] = http.post("/api/draft/check", json={"name": "x", "values": BASE}).json()
    assert good["problems"] == []
    assert good["command"] == "lowrank train model.path=lowrank/tiny data.train=lowrank/demo output_dir=runs/x"
    values = {**BASE, "adapter.rank": "abc", "optimizer.learning_rate": "-1", "seed": "1.5"}
    bad = http.post("/api/draft/check", json={"name": "x", "values": values}).json()
    assert {one["path"] for one in bad["problems"]} == {"adapter.rank", "optimizer.learning_rate", "seed"}


def test_a_file_of_theirs_becomes_a_form(http: httpx.Client, running: Running) -> None:
    uploads = running.board.places.uploads
    (uploads / "rows.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    (uploads / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    theirs = (
        "model_name_or_path: lowrank/tiny\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
        "dataset: rows\ndataset_dir: data\ntemplate: default\ncutoff_len: 512\nlora_rank: 4\nlearning_rate: 1e-4\n"
        "num_train_epochs: 1\noutput_dir: saves/x\n"
    )
    answer = http.post("/api/draft/read", json={"text": theirs}).json()
    assert "draft" in answer, answer
    values = answer["draft"]["values"]
    assert values["adapter.rank"] == 4
    assert values["data.max_length"] == 512
    assert answer["draft"]["name"] == "x"
    again = http.post("/api/draft/check", json={**answer["draft"]}).json()
    assert again["problems"] == []


@pytest.mark.parametrize(
    "text",
    [
        BOMB, "!!python/object/apply:os.system ['touch evil']", "a: *b", "[" * 3000, "{", "", "- a", "\x00",
        "a: 1\na: 2",
        "model: lowrank/tiny\ndata: /etc/passwd\noutput_dir: /etc/x\n",
        "model: lowrank/tiny\ndata: lowrank/demo\noutput_dir: x\nadapter: {type: 'evil:X'}\n",
    ],
)  # fmt: skip
def test_evil_files_are_refused_in_words(http: httpx.Client, running: Running, text: str) -> None:
    (running.board.places.folder / "evil.py").write_text("open('evil', 'w').close()", encoding="utf-8")
    begun = time.monotonic()
    answer = http.post("/api/draft/read", json={"text": text})
    assert answer.status_code == 200
    assert answer.json()["problems"][0]["text"]
    assert "worker" not in answer.text  # where the board keeps the file for a moment
    assert time.monotonic() - begun < 60
    assert not (running.board.places.folder / "evil").exists()


def test_what_a_run_needs_is_answered_before_what_else_would_fit(http: httpx.Client) -> None:
    values = {**BASE, "data.max_samples": 8}
    answer = http.post("/api/draft/plan?brief=true", json={"values": values}).json()
    assert answer["plan"]["plan"]["fits"], answer
    assert set(answer["plan"]) == {"plan", "speed"}


def test_the_newest_request_wins(running: Running, http: httpx.Client) -> None:
    worker, received = running.board.warm_worker, []

    def request() -> None:
        try:
            worker.run(["plan", "lowrank/none.yaml", "--json"], topic="t")
        except Superseded:
            received.append("superseded")

    for _ in range(3):
        threads = [threading.Thread(target=request) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert worker.run(["show", "nothing.yaml", "--json"], topic="t").error
    assert http.post("/api/draft/check", json={"values": BASE}).json()["problems"] == []


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


_SLOW_TO_START = """
import time
from lowrank.cli.warm import serve_requests

def handle(request):
    open(request["out"], "w").close()
    time.sleep(100)

time.sleep(0.5)
serve_requests(handle)
"""


def _slow_workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Workers whose forks end by being killed alone; those that were started."""
    started: list[subprocess.Popen[bytes]] = []

    def start(cwd: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _SLOW_TO_START]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(children, "start_warm_worker", start)
    return started


def test_a_request_superseded_before_it_began_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fork is made later, opens files in a folder that must still be there, and would run on unseen."""
    started = _slow_workers(monkeypatch)
    worker, received = WarmWorker(tmp_path, tmp_path / "worker"), []

    def request() -> None:
        try:
            worker.run(["plan"], topic="t")
        except Superseded:
            received.append("superseded")

    threads = [threading.Thread(target=request, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    _until(lambda: len(received) == 2 and len(psutil.Process(started[0].pid).children()) == 1)
    (newest,) = psutil.Process(started[0].pid).children()
    worker.close()
    _until(lambda: len(received) == 3 and not _lives(newest))
    assert not list((tmp_path / "worker").iterdir())


def test_nobody_waits_for_a_worker_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next one is started before its end is noticed: its fork holds its output open."""
    started = _slow_workers(monkeypatch)
    worker, received = WarmWorker(tmp_path, tmp_path / "worker"), dict[str, object]()

    def request(topic: str) -> None:
        try:
            received[topic] = worker.run(["plan"], topic=topic).code
        except Superseded:
            received[topic] = "superseded"

    threading.Thread(target=request, args=["one"], daemon=True).start()
    _until(lambda: len(started) == 1 and len(psutil.Process(started[0].pid).children()) == 1)
    first = psutil.Process(started[0].pid)
    (fork,) = first.children()
    first.kill()
    _until(lambda: not _lives(first))
    threading.Thread(target=request, args=["other"], daemon=True).start()
    _until(lambda: received == {"one": 1} and len(started) == 2 and not _lives(fork))
    worker.close()
    _until(lambda: received == {"one": 1, "other": "superseded"})
    assert not list((tmp_path / "worker").iterdir())


@pytest.mark.slow
def test_it_is_ended_before_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one."""
    for name, real in REAL.items():
        monkeypatch.setattr(children, name, real)

    def warm() -> list[psutil.Process]:
        children = psutil.Process().children()
        return [child for child in children if child.cmdline()[-2:] == ["-m", "lowrank.cli.warm"]]

    with board_on(tmp_path) as running, running.client() as http:
        http.post("/api/draft/check", json={"values": BASE})
        assert warm()
        task = running.board.queue.add("x", ["--version"])
        running.board.queue.wait(task.id, 240)
        assert not warm()
        assert not list((running.board.places.own / "worker").iterdir())
