"""The tracker of docs/add-a-reporter.md as it stands there, held to the contract; and the contract, to its word."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lowrank.report.reporters.trackers as trackers
from lowrank.errors import ConfigError
from lowrank.report.reporters.trackers import connect_trackers, known_trackers
from tests.report import test_reporter_contract as contract
from tests.report.event_stream import TWO, report_all, run_events

PAGE = Path(__file__).parents[2] / "docs" / "add-a-reporter.md"
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A file of the trackers' folder, for the length of one test."""
    folder = tmp_path / "trackers"
    folder.mkdir()
    monkeypatch.setattr(trackers, "__path__", [*trackers.__path__, str(folder)])

    def write(name: str, code: str) -> str:
        (folder / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"{trackers.__name__}.{name}", raising=False)
        return name

    return write


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return code


def hold_to_the_contract(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract.test_a_whole_run_and_its_resume_are_heard(name, folder / "1")
    contract.test_nothing_is_there_before_the_run_begins(name, folder / "2")
    contract.test_hostile_names_and_texts_are_borne(name, folder / "3")
    contract.test_a_tracker_s_package_is_an_extra(name, monkeypatch, folder / "4")


def test_the_example_fulfills_the_contract(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, so no extra, and nothing is skipped."""
    name = write("loss_table", example())
    assert name in known_trackers()
    hold_to_the_contract(name, tmp_path, monkeypatch)
    report_all(run_events(TWO, tmp_path / "run"), *connect_trackers(tmp_path / "run", [name]))
    lines = [line.split("\t") for line in (tmp_path / "run" / "losses.tsv").read_text().splitlines()]
    assert {(job, step) for job, step, what, _ in lines if what == "eval/loss" and job == "b"} == {
        ("b", "4"), ("b", "8"), ("b", "12"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["text_log", "csv"])
def test_what_forgets_its_folder_fails_whatever_its_name(
    name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, example().replace("            self.path.parent.mkdir(parents=True, exist_ok=True)\n", ""))
    with pytest.raises(FileNotFoundError):
        hold_to_the_contract(name, tmp_path, monkeypatch)


def test_a_package_of_another_name_is_skipped_only_if_it_is_missing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = example().replace("    return LossTable", "    import comet_of_nobody\n\n    return LossTable")
    with pytest.raises(pytest.skip.Exception, match="comet_of_nobody is not installed"):
        contract.connected(write("comet", code), tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'lowrank-llm\[comet\]'"):
        connect_trackers(tmp_path, ["comet"])
    with pytest.raises(AssertionError, match="comet_of_nobody"):  # pyproject.toml has no such extra
        contract.test_a_tracker_s_package_is_an_extra("comet", monkeypatch, tmp_path)
    there = code.replace("import comet_of_nobody", "import torch.no_such_module")
    with pytest.raises(AssertionError, match="can run here, and does not"):
        contract.connected(write("installed", there), tmp_path)
