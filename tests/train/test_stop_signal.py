"""A run that is asked to end: by signals, by a file; before its first step and after; and what a script receives."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank.cli import main
from lowrank.cli.interrupts import end_as_usual
from lowrank.config import validate_settings
from lowrank.errors import ConfigError, OutputError
from lowrank.kernels import glibc_malloc
from lowrank.pipelines.artifacts import adapter_folder, find_artifacts
from lowrank.pipelines.train import train
from lowrank.report.event_lines import decode
from lowrank.report.events import Event, Notice, RunStarted, Stage, StepDone
from lowrank.report.reporters.json_lines import JsonReporter
from lowrank.train.stop_signal import StopSignal
from tests.command_line import lowrank

SHORT = ["model=lowrank/tiny", "data.train=lowrank/demo", "data.max_samples=16", "data.batch_size=2", "adapter.rank=2"]


def settings(out: Path, **changes: Any) -> Any:
    data = {"train": "lowrank/demo", "max_samples": 16, "batch_size": 2}
    return validate_settings(
        {"model": "lowrank/tiny", "data": data, "adapter": {"rank": 2}, "output_dir": str(out), **changes}
    )


class Doing:
    """Does something once, at the first event of a kind."""

    def __init__(self, when: Callable[[Event], bool], what: Callable[[], object]) -> None:
        self.events: list[Event] = []
        self.when, self.what, self.done = when, what, False

    def report(self, event: Event) -> None:
        self.events.append(event)
        if not self.done and self.when(event):
            self.done = True
            self.what()

    def close(self) -> None: ...

    def texts(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Notice))


@pytest.fixture(params=["SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def sent(request: pytest.FixtureRequest) -> int:
    return getattr(signal, request.param)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup, which a run respects
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def second_step(event: Event) -> bool:
    return isinstance(event, StepDone) and event.step == 2


def loading(event: Event) -> bool:
    return isinstance(event, Stage) and event.text.startswith("loading")


def test_a_signal_saves_and_the_run_goes_on_and_can_be_talked_to(sent: int, tmp_path: Path) -> None:
    doing = Doing(second_step, lambda: os.kill(os.getpid(), sent))
    out = tmp_path / "run"
    summary = train(settings(out, max_steps=6), reporters=[doing])
    assert summary["interrupted"]
    assert (out / "checkpoints" / "step-000002" / "state.json").is_file()
    job = summary["jobs"]["default"]
    assert job["finished"] == "interrupted"
    assert (out / job["paths"]["last"] / "adapter_config.json").is_file()
    assert "best" not in job["paths"]
    assert "default" in find_artifacts(str(out)).adapters
    done = train(settings(out, max_steps=6, resume=True))
    assert (done["interrupted"], done["jobs"]["default"]["steps"]) == (False, 6)


def test_a_file_in_the_run_folder_saves_and_is_gone(tmp_path: Path) -> None:
    """Also where the parent has had SIGINT ignored."""
    out = tmp_path / "run"

    def request_stop() -> None:
        (out / "stop").touch()
        time.sleep(1.2)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        doing = Doing(second_step, request_stop)
        summary = train(settings(out, max_steps=50), reporters=[doing])
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary["interrupted"]
    assert summary["jobs"]["default"]["steps"] < 50
    assert "stop was found: stopping after this step and saving" in doing.texts()
    assert not (out / "stop").exists()


@pytest.mark.parametrize("how", ["file", "SIGTERM"])
def test_before_the_first_step_it_ends_at_once(how: str, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def request_stop() -> None:
        if how == "file":
            (out / "stop").touch()
            time.sleep(3)  # handled in the meantime
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(settings(out, max_steps=4), reporters=[Doing(loading, request_stop)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (out / "stop").exists()
    assert not (out / "summary.json").exists()
    assert train(settings(out, max_steps=1))["jobs"]["default"]["steps"] == 1  # nothing stands in the way


@pytest.mark.parametrize("how", ["file", "SIGTERM"])
def test_an_import_is_not_interrupted(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in C may abort the process when an exception meets it half imported (triton did, exit 134)."""
    request_stop = "open('stop', 'w').close()" if how == "file" else "os.kill(os.getpid(), signal.SIGTERM)"
    source = f"import os, signal, time\n{request_stop}\nfor _ in range(100): time.sleep(0.01)\nwhole = True\n"
    (tmp_path / f"slow_to_import_{how}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def load() -> None:
        assert importlib.import_module(f"slow_to_import_{how}").whole
        for _ in range(300):
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), StopSignal(tmp_path / "stop"):
        load()
    assert sys.modules[f"slow_to_import_{how}"].whole


def test_until_training_listens_a_signal_ends_the_process_with_its_closing_line() -> None:
    code = (
        "import signal, sys; from lowrank.cli import main; sys.argv[1:] = ['train', 'run.yaml', '--json']; "
        "main._run = lambda *given: signal.raise_signal(signal.SIGTERM); main.main(); print('went on')"
    )
    environment = {**os.environ, **glibc_malloc.without_cache()}  # or it would start itself again, without our change
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.returncode, json.loads(done.stdout)["error"]["exit_code"]) == (130, 130), done.stderr


def test_only_what_has_saved_nothing_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LLaMA-Factory file may stand for several commands: those around training are no training that loads."""
    usual, seen = signal.getsignal(signal.SIGTERM), {}

    def run(arguments: list[str], as_json: bool) -> int:
        seen[arguments[0]] = signal.getsignal(signal.SIGTERM)
        if arguments[0] == "train":
            end_as_usual()  # as the command does when training is over
            seen["summary"] = signal.getsignal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(main, "_run", run)
    monkeypatch.setattr(main, "_as_ours", lambda arguments: [["data"], ["train"], ["predict"]])
    monkeypatch.setattr(sys, "argv", ["lowrank", "train", "run.yaml"])
    monkeypatch.setattr(glibc_malloc, "start_again_without_cache", lambda: None)
    monkeypatch.setattr(glibc_malloc, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit):
        main.main()
    assert seen.pop("train") is not usual
    assert seen == {"data": usual, "summary": usual, "predict": usual}
    assert signal.getsignal(signal.SIGTERM) is usual


def test_a_file_of_an_earlier_run_is_not_heard(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "stop").touch()
    os.utime(out / "stop", (1e9, 1e9))
    assert not train(settings(out, max_steps=1))["interrupted"]
    assert not (out / "stop").exists()


def test_stop_is_no_name_of_a_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'stop' cannot be the name"):
        settings(tmp_path, jobs=[{"name": "stop"}])


def test_after_a_kill_the_checkpoint_is_found(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(out, max_steps=2, save_steps=1))
    for name in ("best", "last"):
        (out / "default" / name).rename(tmp_path / name)
    reported: list[str] = []
    found = find_artifacts(str(out), notify=reported.append)
    assert found.adapters["default"].parent.name == "step-000002"
    assert reported == ["default has no best yet, this is its adapter of checkpoint step-000002"]


def test_a_run_is_taken_for_its_adapter(tmp_path: Path) -> None:
    train(settings(tmp_path / "one", max_steps=1))
    train(settings(tmp_path / "two", max_steps=1, jobs=[{"name": "a"}, {"name": "b"}]))
    assert adapter_folder(str(tmp_path / "one"), "adapter.path") == tmp_path / "one" / "default" / "best"
    assert adapter_folder(str(tmp_path / "two" / "b"), "adapter.path") == tmp_path / "two" / "b" / "best"
    with pytest.raises(Exception, match=r"adapter\.path: .* is a run of 2 jobs; name one: a, b"):
        adapter_folder(str(tmp_path / "two"), "adapter.path")
    again = train(settings(tmp_path / "on", max_steps=1, adapter={"path": str(tmp_path / "one")}))
    assert again["jobs"]["default"]["steps"] == 1


def test_a_silent_second_is_filled(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream, silence=0.05)
    reporter.report(Stage("loading x"))
    time.sleep(0.3)
    reporter.close()
    lines = [decode(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines[:2]] == ["stage", "progress"]
    assert 2 <= len(lines) <= 8
    assert lines[-1]["doing"] == "loading x"
    assert lines[-1]["seconds"] > lines[1]["seconds"]


@pytest.mark.parametrize(
    ("broken", "code", "kind"),
    [
        ("raise KeyboardInterrupt", 130, "Interrupted"),
        ("raise ZeroDivisionError('x')", 1, "UnexpectedError"),
        ("raise MemoryError('out of memory')", 1, "UnexpectedError"),
        ("raise OSError(28, 'No space left on device', '/disk')", 5, "OutputError"),
        ("raise RuntimeError('I/O error: No space left on device (os error 28)')", 5, "OutputError"),
    ],
)
def test_json_always_ends_with_one_closing_line(broken: str, code: int, kind: str, tmp_path: Path) -> None:
    arguments = ["model=lowrank/tiny", "data.train=[{path: lowrank/demo, format: 'rows:rows'}]", "max_steps=1"]
    arguments += ["output_dir=run", "--json", "--allow-code"]
    (tmp_path / "rows.py").write_text(
        f"from lowrank.records import Conversation\ndef rows(row, columns, tags) -> Conversation:\n    {broken}\n"
    )
    done = lowrank("train", *arguments, cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["error"]["exit_code"], last["error"]["type"]) == (code, code, kind)


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowrank.checkpoints.atomic as atomic

    out = tmp_path / "run"
    sync = atomic._sync_file  # pyright: ignore[reportPrivateUsage]

    def full(path: Path) -> None:
        if "adapter_model" in path.name or "optimizer" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(atomic, "_sync_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        train(settings(out, max_steps=2))
    monkeypatch.undo()
    assert train(settings(out, max_steps=2, resume=True))["jobs"]["default"]["steps"] == 2


class Failing:
    def __init__(self, at: type) -> None:
        self.at = at

    def report(self, event: Event) -> None:
        if isinstance(event, self.at):
            raise ConnectionError("no network")

    def close(self) -> None:
        raise ConnectionError("still none")


def test_decoration_never_kills_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("lowrank.report.plots.write_loss_plot", fails)
    monkeypatch.setattr("lowrank.pipelines.train.write_report", fails)
    ear = Doing(lambda event: False, lambda: None)
    summary = train(settings(tmp_path / "run", max_steps=1), reporters=[Failing(RunStarted), Failing(StepDone), ear])
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8")) == summary
    assert ear.texts().count("Failing failed and receives no more events: ConnectionError: no network") == 2
    assert "loss.png could not be written (ValueError: no font)" in ear.texts()
    assert "report.html could not be written" in ear.texts()


def test_a_kernel_s_backend_does_not_reach_our_pictures(tmp_path: Path) -> None:
    backend = "module://matplotlib_inline.backend_inline"
    arguments = [*SHORT, "max_steps=1", f"output_dir={tmp_path / 'run'}", "--quiet"]
    code = (
        "import os, sys; os.environ['MPLBACKEND'] = 'module://no_such_package.backend'; import lowrank.report.plots; "
        "assert os.environ['MPLBACKEND'].startswith('module'); import lowrank.contrib.quantization_report.plot"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    done = lowrank("train", *arguments, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_job_whose_loss_is_not_finite_is_told_by_the_exit_code(tmp_path: Path) -> None:
    arguments = [
        *SHORT,
        "max_steps=20",
        "output_dir=run",
        "optimizer.learning_rate=1e30",
        "model.dtype=float32",
        "--json",
    ]
    arguments += ["optimizer.max_skipped_steps=0"]
    done = lowrank("train", *arguments, cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["jobs"]["default"]["finished"] == "not_finite", last["jobs"]
    assert done.returncode == 7


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    train(settings(tmp_path / "run", max_steps=1))
    adapter = tmp_path / "run" / "default" / "best"
    (tmp_path / "moved").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "moved" / "adapter_config.json").read_text("utf-8"))
    content["base_model_name_or_path"] = "/home/nobody/base"
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"adapter_config\.json names the base /home/nobody/base .*--base PATH"):
        find_artifacts(str(tmp_path / "moved"))
    assert find_artifacts(str(tmp_path / "moved"), base="lowrank/tiny").model.path == "lowrank/tiny"
    with pytest.raises(Exception, match=r"--base: .* is a model by itself"):
        find_artifacts("lowrank/tiny", base="x")
