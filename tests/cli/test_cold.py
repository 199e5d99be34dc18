"""What a command that reads no weights imports: seconds that a person waits for each time."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank import __main__ as entry
from lowrank.cli.main import main
from tests.releases import since

PLAN = Path(__file__).parent.parent.parent / "examples" / "01_sft.yaml"
CODE = """
import sys
from lowrank.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert not left.code, left.code
print(*sys.modules, file=sys.stderr)
"""
NOT_OF_DATA = {
    "accelerate", "datasets", "matplotlib", "pandas", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor",
    "transformers.activations", "transformers.modeling_utils", "triton", "lowrank.train.engine",
}  # fmt: skip
NOT_OF_PLAN = {"datasets", "matplotlib", "pandas", "peft", "trl", "lm_eval", "fastapi", "lowrank.pipelines.train"}
"""A plan runs the model's own class on fake tensors, and transformers' modeling_utils brings the rest along."""


def imported(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@since("5.24", "its tokenizers bring no model's code along")
def test_data_imports_no_model_s_code(tmp_path: Path) -> None:
    """Neither the engine nor the class of the model's configuration (of Llama: torch.distributed, sympy)."""
    (tmp_path / "run.yaml").write_text("model: lowrank/tiny\ndata: {train: rows.json}\noutput_dir: run\n")
    (tmp_path / "rows.json").write_text('[{"instruction": "q", "output": "a"}]')
    assert imported("data", str(tmp_path / "run.yaml")) & NOT_OF_DATA == set()


def test_a_cold_command_seldom_looks_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own process; somebody else's stays as it is."""
    given: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: given.append(numbers))
    for arguments, expected in ((["data", "--help"], 1), (["plan", "--help"], 1), (["board", "--help"], 0)):
        given.clear()
        with pytest.raises(SystemExit):
            main(arguments)
        assert given == []
        monkeypatch.setattr(sys, "argv", ["lowrank", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert len(given) == expected


ENDING = """
import atexit
from lowrank.cli.quick_exit import QuickExit
class Kept:
    def __del__(self): print("freed")
kept, ending = Kept(), QuickExit()
atexit.register(print, "registered later")
print("a result")
ending.code = {code}
"""


@pytest.mark.parametrize(("code", "end"), [(3, ""), (0, ""), (None, "freed\n")])
def test_a_quick_exit_frees_nothing_and_leaves_nothing_out(code: int | None, end: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING.format(code=code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code or 0, "")
    assert done.stdout == "a result\nregistered later\n" + end


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [("data", ["--help"], [0]), ("show", ["nothing.yaml"], [2]), ("jobs", ["--help"], []), ("report", ["--help"], [])],
)
def test_what_only_looks_ends_quickly(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str], expected: list[int]
) -> None:
    """With the code that the command had."""
    made: list[Recorded] = []

    class Recorded:
        code: int | None = None

        def __init__(self) -> None:
            made.append(self)

    monkeypatch.setattr(entry, "QuickExit", Recorded)
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["lowrank", name, *arguments])
    with pytest.raises(SystemExit):
        entry.run()
    assert [each.code for each in made] == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device that is always full")
@pytest.mark.parametrize("arguments", [["show", "--schema"], ["show", "nothing.yaml", "--json"]])
def test_what_cannot_be_written_is_no_success(arguments: list[str]) -> None:
    """Nor a traceback of what could not be written either."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "lowrank", *arguments], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode in (2, 5)
    assert len(done.stderr.splitlines()) == 1, done.stderr.decode()


@pytest.mark.slow
def test_a_plan_imports_what_it_runs_and_no_more() -> None:
    assert imported("plan", str(PLAN)) & NOT_OF_PLAN == set()
