"""Live commands from the page: the same files as the command lines that it shows write, and nothing that it may not."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank.checkpoints.live_commands import CommandQueue, LiveCommand
from lowrank.cli.main import main
from lowrank.config import validate_settings
from tests.board.running import Running, board_on

CONFIG = {
    "model": {"path": "lowrank/tiny"},
    "data": {"train": ["lowrank/demo"]},
    "output_dir": "runs/live",
    "jobs": [{"name": "r8", "adapter": {"rank": 8}}],
}
STATE = {
    "time": 0.0,
    "ended": False,
    "memory": {"used": 512_000_000, "planned": 640_000_000},
    "jobs": [
        {
            "name": "r8", "state": "running", "step": 3, "num_steps": 9, "loss": 1.5, "held_out_loss": None,
            "best_loss": None, "learning_rate": 1e-4, "priority": 0, "seconds_left": 60.0, "description": "lora r=8",
            "verdict": {"kind": "falling", "sentence": "Still falling.", "step": None, "parts": []},
        },
        {"name": "<b>x</b>", "state": "paused"},
    ],
}  # fmt: skip
COMMANDS: list[dict[str, Any]] = [
    {"kind": "stop", "job": "r8"},
    {"kind": "pause", "job": "r8"},
    {"kind": "resume", "job": "r8"},
    {"kind": "priority", "job": "r8", "priority": 2},
    {"kind": "priority", "job": "r8", "priority": -1},
    {"kind": "set", "job": "r8", "changes": {"optimizer.learning_rate": "1e-5"}, "text": "schedule: {type: constant}"},
    {"kind": "clone", "job": "r8", "changes": {"optimizer.learning_rate": "3e-4"}},
    {"kind": "clone", "job": "r8", "changes": {"adapter.rank": "4", "seed": ""}, "name": "it's r4", "from_start": True},
    {
        "kind": "add",
        "name": "r32",
        "changes": {"adapter.rank": "32"},
        "text": "name: x\nadapter: {type: dora}\nseed: 3",
    },
]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with board_on(tmp_path) as found:
        yield found


@pytest.fixture
def live(running: Running) -> Path:
    return write_live(running.board.places.runs / "live")


def write_live(folder: Path) -> Path:
    """A run folder whose run lives, in this process, and takes commands."""
    (folder / "commands").mkdir(parents=True)
    marker = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    for name, content in ((".lowrank.json", marker), ("config.json", CONFIG), ("commands/state.json", STATE)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def last(folder: Path) -> LiveCommand:
    return CommandQueue(folder).due(0)[-1]


@pytest.mark.parametrize("wanted", COMMANDS, ids=lambda wanted: wanted["kind"])
def test_the_command_line_that_is_shown_sends_the_same(
    running: Running, live: Path, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running.client() as http:
        shown = http.post("/api/runs/live/commands/preview", json=wanted).json()["command_line"]
        assert not list((live / "commands").glob("0*.json"))
        given = http.post("/api/runs/live/commands", json=wanted).json()
    assert given == {"number": 1, "command_line": shown}
    ours = last(live)
    monkeypatch.chdir(running.board.places.folder)
    lowrank, *arguments = shlex.split(shown)
    assert lowrank == "lowrank"
    place = arguments.index("--") if "--" in arguments else len(arguments)
    with pytest.raises(SystemExit) as ended:
        main([*arguments[:place], "--timeout", "0", *arguments[place:]])
    assert ended.value.code == 5, "nobody answers here"
    theirs = last(live)
    assert (theirs.number, theirs.kind, theirs.job) == (2, ours.kind, ours.job)
    if wanted["kind"] == "add":
        one, other = (
            validate_settings({**CONFIG, "jobs": [each.values["settings"]]}).jobs[0] for each in (ours, theirs)
        )
        assert one == other
        assert (one.name, one.adapter.type, one.adapter.rank, one.seed) == ("r32", "dora", 32, 3)
    else:
        assert theirs.values == ours.values


def test_the_page_shows_commands_and_replies(running: Running, live: Path) -> None:
    with running.client() as http:
        number = http.post("/api/runs/live/commands", json={"kind": "pause", "job": "<b>x</b>"}).json()["number"]
        assert http.get(f"/api/runs/live/commands/{number}").json() == {"answered": False}
        before = http.get("/part/runs/live/details").text
        CommandQueue(live).acknowledge(last(live), 4, "<i>refused</i>", done=False)
        assert http.get(f"/api/runs/live/commands/{number}").json()["text"] == "<i>refused</i>"
        page = http.get("/part/runs/live/details").text
    assert "lowrank pause runs/live &#39;&lt;b&gt;x&lt;/b&gt;&#39;" in page
    assert "&lt;i&gt;refused&lt;/i&gt;" in page
    assert "refused" not in before
    assert 'data-steer="r8"' in page
    assert "Still falling." in page
    assert "512 MB" in page
    assert "640 MB" in page


def test_a_run_of_a_former_version_is_steered_and_shown(running: Running, live: Path) -> None:
    """It trains since before the folder was renamed, and reads the one it made."""
    (live / "commands").rename(live / "orders")
    with running.client() as http:
        assert http.post("/api/runs/live/commands", json={"kind": "pause", "job": "r8"}).json()["number"] == 1
        CommandQueue(live).acknowledge(last(live), 4, "r8 is paused", done=True)
        assert http.get("/api/runs/live/commands/1").json()["text"] == "r8 is paused"
        page = http.get("/part/runs/live/details").text
    assert "lowrank pause runs/live r8" in page
    assert "512 MB" in page
    assert (live / "orders" / "000001.json").is_file()
    assert not (live / "commands").exists()


def test_what_may_not_be_sent(running: Running, live: Path) -> None:
    sums = ",".join(["*a"] * 9)
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(
        f"{x}: &{x} [{sums.replace('a', y)}]" for x, y in zip("bcdefgh", "abcdefg")
    )
    refused: list[tuple[dict[str, Any], str]] = [
        ({"kind": "set", "job": "r8"}, "no setting was changed"),
        ({"kind": "pause"}, "choose an adapter"),
        ({"kind": "add", "changes": {"adapter.rank": 4}}, "needs a name"),
        ({"kind": "add", "name": "n", "text": "data: {train: [/etc/passwd]}"}, "lies outside"),
        ({"kind": "add", "name": "n", "changes": {"adapter.path": "../../x"}}, "lies outside"),
        ({"kind": "clone", "job": "r8", "changes": {"data.train": ["/etc/hosts.json"]}}, "lies outside"),
        ({"kind": "set", "job": "r8", "text": "objective: {reward_funcs: [evil:f]}"}, "--allow-code"),
        ({"kind": "add", "name": "n", "text": "adapter: evil:X"}, "--allow-code"),
        ({"kind": "add", "name": "n", "text": bomb}, "aliases"),
        ({"kind": "add", "name": "n", "text": "a: !!python/object/apply:os.system [x]"}, "could not determine a con"),
        ({"kind": "add", "name": "n", "text": "- 1"}, "expected settings"),
    ]  # fmt: skip
    with running.client() as http:
        for wanted, message in refused:
            answer = http.post("/api/runs/live/commands", json=wanted)
            assert answer.status_code == 400, wanted
            assert message in answer.json()["error"]["message"], answer.text
            assert message in http.post("/api/runs/live/commands/preview", json=wanted).json()["problem"]
        for wanted in (
            {"kind": "format"},
            {"kind": "stop", "job": "r8", "run": "x"},
            {"kind": "priority", "priority": 1e9},
        ):
            assert http.post("/api/runs/live/commands", json=wanted).status_code == 422
        assert http.post("/api/runs/nothing/commands", json=COMMANDS[0]).status_code == 404
    assert not list((live / "commands").glob("0*.json"))


@pytest.mark.parametrize("state", [{}, {"ended": True}, {"jobs": 3}, {"jobs": [3, {}, {"name": ["x"]}]}, [1], None])
def test_a_run_that_takes_no_commands_is_sent_none(running: Running, live: Path, state: Any) -> None:
    path = live / "commands" / "state.json"
    if state is None:  # the folder leads elsewhere
        (live / "commands").rename(live.parent.parent / "elsewhere")
        (live / "commands").symlink_to(live.parent.parent / "elsewhere")
    else:
        path.write_text(json.dumps(state), encoding="utf-8")
    with running.client() as http:
        assert http.get("/runs/live").status_code == 200
        if not (isinstance(state, dict) and "jobs" in state):
            assert http.post("/api/runs/live/commands", json=COMMANDS[0]).status_code == 409
    assert not list((live.parent.parent).glob("elsewhere/0*.json"))
