"""The command line as a program: start-up, errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lowrank
from lowrank.cli import main as cli
from lowrank.errors import ConfigError, DataError, LowrankError, ModelError, OutputError
from tests.command_line import lowrank as forked
from tests.processor_speed import slowness

DOCS = Path(lowrank.__file__).parent.parent / "docs"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "lowrank", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_help_is_fast_and_names_every_command() -> None:
    seconds = []
    for _ in range(3):
        start = os.times().children_user + os.times().children_system  # of the processor: this machine has other work
        result = run("--help", COLUMNS="200")
        seconds.append(os.times().children_user + os.times().children_system - start)
        assert result.returncode == 0
        for name in cli.LazyGroup().list_commands(None):
            assert cli._commands()[name] in result.stdout
        assert "130 interrupted" in result.stdout
    assert min(seconds) < 0.5 * slowness()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["show", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from lowrank.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_help_shows_what_stands_in_brackets() -> None:
    """Typer reads `[eval]` as a style, unless it is escaped."""
    assert "pip install 'lowrank-llm[eval]'" in forked("eval", "--help", COLUMNS="200").stdout


def test_version() -> None:
    assert run("--version").stdout == f"lowrank {lowrank.__version__}\n"


def test_without_words_help_is_shown() -> None:
    result = run()
    assert "Usage" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments", [["trian"], ["show"], ["show", "x.yaml", "--nope"], ["train"], ["show", "no-such-file.yaml"]]
)
def test_what_is_wrong_with_the_command_line_or_the_configuration_is_2(arguments: list[str]) -> None:
    plain, as_json = forked(*arguments), forked(*arguments, "--json")
    assert plain.returncode == as_json.returncode == 2
    assert plain.stderr
    assert "Traceback" not in plain.stderr
    error = json.loads(as_json.stdout)["error"]
    assert set(error) == {"type", "message", "exit_code"}
    assert error["exit_code"] == 2
    assert error["message"]


def test_all_problems_of_a_file_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: a/b, mxlength: 3}\nadapter: {rnk: 8}\n")
    result = forked("show", str(path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert "adapter.rnk: unknown key; did you mean 'rank'?" in result.stderr
    assert "data.mxlength: unknown key; did you mean 'max_length'?" in result.stderr
    assert "output_dir: required" in result.stderr


def test_every_kind_of_error_has_its_documented_code() -> None:
    kinds = {ConfigError: 2, DataError: 3, ModelError: 4, OutputError: 5, LowrankError: 1}
    for kind, code in kinds.items():
        assert kind.exit_code == code
        assert code in cli.EXIT_CODES


def test_exit_codes_are_documented() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    for code, meaning in cli.EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in page


@pytest.mark.parametrize("error", [DataError("row 3: no answer"), ModelError("no such base"), OutputError("not empty")])
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_from_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: LowrankError, as_json: bool
) -> None:
    import lowrank.cli.show

    def fail(json: bool = False) -> None:
        raise error

    monkeypatch.setattr(lowrank.cli.show, "show", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["show", "--json"] if as_json else ["show"])
    assert caught.value.code == error.exit_code
    output = capsys.readouterr()
    if as_json:
        assert json.loads(output.out) == {
            "error": {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        }
    else:
        assert output.out == ""
        assert output.err.strip() == str(error)


@pytest.mark.parametrize("arguments", [["show"], ["show", "--json"]])
def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    import lowrank.cli.show

    def interrupted(json: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lowrank.cli.show, "show", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 130


def test_ctrl_c_says_what_is_left_of_an_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import lowrank.pipelines.export

    def interrupted(found: Any, requests: Any, **options: Any) -> None:
        for each in requests[: len(written)]:
            each.folder.mkdir(parents=True)
            if written[each.type]:
                (each.folder / lowrank.pipelines.export.REPORT).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(lowrank.pipelines.export, "export_targets", interrupted)
    ends: list[tuple[dict[str, bool], str]] = [
        ({}, "interrupted; nothing was written"),
        ({"peft": True, "merged": False}, "interrupted; written and compared: peft (2/peft); written, not compared: "
         "merged (2/merged); the rest was not; name it alone with --to"),
        ({"peft": True, "merged": True, "gguf": True}, "interrupted; written and compared: peft (3/peft), merged "
         "(3/merged), gguf (3/gguf)"),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for written, message in ends:
        with pytest.raises(SystemExit) as caught:
            cli.main(["export", "lowrank/tiny", "--to", "peft,merged,gguf", "-o", str(len(written)), "--json"])
        assert caught.value.code == 130
        assert json.loads(capsys.readouterr().out)["error"]["message"] == message


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import lowrank.cli.show

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(lowrank.cli.show, "show", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["show"])


@pytest.mark.parametrize(("arguments", "expected"), [("lowrank sh", "show"), ("lowrank show --sch", "--schema")])
def test_tab_completion(arguments: str, expected: str) -> None:
    environment = {
        "_LOWRANK_COMPLETE": "complete_bash",
        "COMP_WORDS": arguments,
        "COMP_CWORD": str(arguments.count(" ")),
    }
    code = "import sys; sys.argv = ['lowrank']; from lowrank.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    assert result.stdout.split() == [expected]
