"""Tasks as folders: their state is read, whoever started them and whatever became of the board."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank.board.children import Identity
from lowrank.board.last_line import last_lines
from lowrank.board.places import Places
from lowrank.board.queue import Queue
from lowrank.board.tasks import TaskFolders, final_state

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    places = Places(tmp_path)
    places.make()
    return places


@pytest.mark.parametrize(
    ("lines", "stop", "code", "state"),
    [
        (['{"event": "run_finished"}', '{"output_dir": "x", "interrupted": false}'], False, 0, "done"),
        (['{"output_dir": "x", "interrupted": false}'], False, None, "done"),
        (['{"output_dir": "x", "interrupted": true}'], True, 130, "stopped"),
        (['{"output_dir": "x", "interrupted": true}'], False, None, "stopped"),
        (['{"error": {"message": "no", "exit_code": 2}}'], False, 2, "failed"),
        (['{"error": {"message": "no", "exit_code": 2}}'], True, None, "failed"),
        (['{"error": {"type": "Interrupted", "message": "interrupted", "exit_code": 130}}'], True, 130, "stopped"),
        (['{"error": {"type": "Interrupted", "message": "interrupted", "exit_code": 130}}'], True, None, "stopped"),
        (['{"event": "step", "loss": 1}'], False, None, "died"),
        (['{"event": "step", "loss": 1}', '{"event": "st'], False, -9, "died"),
        (['{"event": "step", "loss": 1}'], True, -15, "stopped"),
        ([], True, None, "stopped"),
        ([], False, None, "died"),
        ([], False, 1, "failed"),
        (['{"passed": false}'], False, 6, "failed"),
        (["\x00\xff garbage"], False, None, "died"),
    ],
)
def test_how_a_task_ended_is_in_its_last_words(
    tmp_path: Path, lines: list[str], stop: bool, code: int | None, state: str
) -> None:
    (tmp_path / "output.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "errors.txt").write_text("warning: x\nTraceback\nMemoryError: 3\n", encoding="utf-8")
    if stop:
        (tmp_path / "stop").touch()
    found, message = final_state(tmp_path, code)
    assert found == state
    assert message == ("no" if '"no"' in "".join(lines) else message)
    assert state not in ("died", "failed") or message


def test_a_task_comes_back_from_its_folder(places: Places) -> None:
    task = TaskFolders(places.tasks).create(
        "train", ["train", "{task}/run.yaml", "--json"], subject="a b", files={"run.yaml": "x: 1\n"}, more={"f": 1}
    )
    again = TaskFolders(places.tasks)
    assert again.all() == [task]
    assert task.arguments[1] == f".board/tasks/{task.id}/run.yaml"
    assert (places.folder / task.arguments[1]).read_text("utf-8") == "x: 1\n"
    assert again.outcome(task).state == "waiting"
    assert again.get("../tasks") is None
    assert again.get(".hidden") is None


def test_a_number_that_went_to_another_process_is_not_ours(places: Places) -> None:
    own = Identity.of(os.getpid())
    assert own is not None
    assert own.lives
    assert not Identity(own.pid, own.started - 1000).lives
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        identity = Identity.of(process.pid)
        assert identity is not None
        while identity.lives:  # ended, and nobody has waited for it: a zombie
            time.sleep(0.01)
        assert process.returncode is None
    assert Identity.of(2**22 + 1) is None


def test_the_order_can_be_changed_and_is_kept(places: Places) -> None:
    queue = Queue(places)
    tasks = [queue.add("train", ["train", f"{n}.yaml"], subject=str(n)) for n in range(4)]
    order = lambda q: [task.subject for task in q.waiting()]  # noqa: E731
    assert order(queue) == ["0", "1", "2", "3"]
    queue.move(tasks[3].id, -1)
    queue.move(tasks[0].id, 1)
    assert order(queue) == ["1", "0", "3", "2"]
    queue.move(tasks[2].id, -999)
    assert order(Queue(places)) == ["2", "1", "0", "3"]
    queue.stop(tasks[1].id)
    assert order(queue) == ["2", "0", "3"]
    assert queue.outcome(tasks[1]).state == "stopped"
    queue.move("nothing", -1)


def test_one_at_a_time_for_each_device(places: Places) -> None:
    queue = Queue(places)
    first = queue.add("x", ["no-such-a", "--json"], device="cpu")
    second = queue.add("x", ["no-such-b", "--json"], device="cpu")
    other = queue.add("x", ["no-such-c", "--json"], device="cuda:1")
    queue.look()
    states = [queue.outcome(task).state for task in (first, second, other)]
    assert states == ["running", "waiting", "running"]
    while queue.running() or queue.waiting():
        time.sleep(0.05)
        queue.look()
    for task in (first, second, other):
        outcome = queue.outcome(task)
        assert outcome.state == "failed"
        assert "no-such-" in outcome.message  # the command's own words
        assert Queue(places).outcome(task) == outcome


def test_nothing_starts_while_a_run_from_a_terminal_works(places: Places) -> None:
    busy = [True]
    queue = Queue(places, external_run_active=lambda: busy[0])
    task = queue.add("x", ["no-such-a", "--json"])
    queue.look()
    assert queue.outcome(task).state == "waiting"
    busy[0] = False
    queue.look()
    assert queue.outcome(task).state == "running"
    while queue.running():
        time.sleep(0.05)
        queue.look()


def test_a_child_is_found_though_its_number_was_never_noted(places: Places) -> None:
    queue = Queue(places)
    task = queue.add("x", ["x"])
    (places.tasks / task.id / "starting").touch()
    code = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "LOWRANK_BOARD_TASK": task.id}) as child:
        queue.look()
        assert queue.outcome(task).state == "running"
        child.kill()
    queue.look()
    assert queue.outcome(task).state == "died"


def test_the_end_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert last_lines(path, 3) == []
    path.write_text("".join(f"{n}" * 50 + "\n" for n in range(20_000)) + '{"half": ', encoding="utf-8")
    assert last_lines(path, 2) == ["19999" * 50, '{"half": ']
    path.write_bytes(b"\n\n")
    assert last_lines(path, 2) == []


def test_words_are_shown_so_that_a_shell_takes_them_whole(places: Places) -> None:
    arguments = ["train", "a b.yaml", "x=it's", "$(rm)", "y=[1, 2]"]
    task = TaskFolders(places.tasks).create("train", arguments)
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shell = task.command.replace("lowrank", f"{sys.executable} -c '{code}'", 1)
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == arguments
