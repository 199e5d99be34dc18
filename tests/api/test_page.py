"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import re
import textwrap
import typing
from pathlib import Path

import pytest

import lowrank
from lowrank.api.page import api_page
from tests.api.documented_code import problems_in

ROOT = Path(lowrank.__file__).parent.parent


def test_the_page_is_current_and_names_everything() -> None:
    page = api_page()
    file = ROOT / "docs" / "api.md"
    assert file.read_text(encoding="utf-8") == page, "python -m lowrank.api.page > docs/api.md"
    assert all(f"### lowrank.{name}" in page for name in lowrank.__all__ if name != "__version__")


def test_no_two_things_have_one_name() -> None:
    headings = [line for line in api_page().splitlines() if line.startswith("### ")]
    assert [each for each in headings if headings.count(each) > 1] == []


def test_every_type_in_a_signature_has_an_entry() -> None:
    page = api_page()
    headings = {line.rpartition(".")[2].rpartition(" ")[2] for line in page.splitlines() if line.startswith("### ")}
    standard = {*dir(builtins), *dir(typing), *dir(collections.abc), "Path", "torch", "np", "pandas"}
    signatures = re.findall(r"^```text\n(.*?)\n(?:\n|```)", page, re.MULTILINE | re.DOTALL)
    fields = re.findall(r"^\w+: (.+?)(?: = .*|    .*)?$", page, re.MULTILINE)
    written = [*(f"field(x: {each})" for each in fields), *(each for each in signatures if "(" in each)]
    annotations = [text for each in written for text in _annotations(each)]
    assert len(annotations) > 250
    missing = {
        name
        for annotation in annotations
        for name in re.findall(r"(?<![.\w'])[A-Za-z_]+(?![\w'])", annotation)
        if name not in standard and name not in headings
    }
    assert not missing


def _annotations(signature: str) -> list[str]:
    try:
        function = ast.parse(f"def {signature.removeprefix('lowrank.')}: ...")
    except SyntaxError:  # prose
        return []
    found = [each.annotation for each in ast.walk(function) if isinstance(each, ast.arg) and each.annotation]
    found += [each.returns for each in ast.walk(function) if isinstance(each, ast.FunctionDef) and each.returns]
    return [ast.unparse(each) for each in found]


def test_signatures_have_types_and_defaults_and_seams_their_members() -> None:
    page = api_page()
    assert "=..." not in page
    for text in ("strict: bool = True", "to: TargetLike | Sequence[TargetLike] = 'merged'", "temperature: float = 0.0"):
        assert text in page
    assert "#### Variant.as_low_rank\n\n```text\nas_low_rank(tensors: Tensors) ->" in page
    order = [
        page.index(f"### lowrank.{name}\n") for name in ("train", "load", "generate", "evaluate", "export", "serve")
    ]
    assert order == sorted(order)
    assert max(order) < page.index("### lowrank.TrainedRun") < page.index("### lowrank.ConfigError")
    for name in ("Answer", "LiveJob", "ApiError", "PendingAnswer", "ServedModel", "Totals", "Metrics", "Need", "Needs"):
        assert f"### {name}\n" in page
    assert "callback" in page


def test_the_settings_a_beginner_needs_stand_on_the_page() -> None:
    page = api_page()
    table = page[page.index("## The settings to begin with") : page.index("## Functions")]
    for name in (
        "data.batch_size",
        "optimizer.learning_rate",
        "adapter.rank",
        "num_train_epochs",
        "max_steps",
        "eval_steps",
    ):
        assert f"| `{name}` | " in table
    assert "| `adapter.rank` | whole number | `16` |" in table


def _examples(page: str) -> list[str]:
    """Blocks of Python, and the lines that stand indented in docstrings, which are code as well."""
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for text in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        indented = re.findall(r"(?:^    (?! ).*\n(?:^ {4,}.*\n|^\n)*)+", text.partition("\n\n")[2], re.MULTILINE)
        blocks += [code for each in indented if "lowrank." in (code := textwrap.dedent(each))]
    return blocks


PAGES = sorted(each for pattern in ("README*.md", "docs/*.md", "examples/*.py") for each in ROOT.glob(pattern))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_on_pages_has_names_and_keywords_that_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    found = [text] if page.suffix == ".py" else _examples(text)
    assert len(found) >= 7 or page.name != "api.md"
    assert [problem for code in found for problem in problems_in(code, {"lowrank": lowrank})] == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("lowrank.train(data=[], max_step=3)", "train has no keyword 'max_step'"),
        ("run = lowrank.train()\nrun.metric()", "TrainedRun has no attribute 'metric'"),
        ("lowrank.TrainedRun('a').load().ask('x')", "Model has no attribute 'ask'"),
        ("run = lowrank.train()\nrun.export('gguf', typs=['q8_0'])", "TrainedRun.export has no keyword 'typs'"),
        ("with lowrank.serve('a', cache_tokens=3) as server:\n    server.url", "serve has no keyword 'cache_tokens'"),
        ("with lowrank.serve('a') as server:\n    server.address", "RunningServer has no attribute 'address'"),
        ("for job in lowrank.LiveRun('a').jobs():\n    print(job.nam)", "LiveJob has no attribute 'nam'"),
        ("from lowrank.models.quantize import x", "there is no lowrank.models.quantize to import"),
        ("lowrank.load('a', 'b')", "load takes 1 arguments by place, not 2"),
        ("def f(event):\n    return isinstance(event, lowrank.StepDon)", "lowrank has no attribute 'StepDon'"),
        ("[lowrank.Message(role='user', contents=x) for x in 'ab']", "Message has no keyword 'contents'"),
    ],
)
def test_what_is_not_there_is_found(code: str, problem: str) -> None:
    assert problems_in(code, {"lowrank": lowrank}) == [problem]


@pytest.mark.slow  # twelve seconds: two runs, two exports
def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, own = re.findall(r"^```python\n(.*?)^```", api_page(), re.MULTILINE | re.DOTALL)
    for number, code in enumerate((first.replace("=20", "=1").replace("=40", "=2"), own)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(compile(code, f"docs/api.md, block {number}", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "0/runs/first/default/last").is_dir()
    assert (tmp_path / "1/merged-model").is_dir()
    losses = lowrank.TrainedRun(tmp_path / "1/runs/own").metrics()
    assert set(losses.job) == {"focal", "grpo"}
