"""What the pages hold: names that the routes give them, and a place for each step that LlamaBoard's people know."""

from __future__ import annotations

import ast
import re
import threading
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2 import meta

import lowrank.board
from lowrank.board import texts
from lowrank.board.app import PREPARING
from lowrank.board.texts import Texts
from tests.board.run_folders import write_run, write_sweep
from tests.board.running import Running, board_on

BOARD = Path(lowrank.board.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
PLACES = {
    "/new": (
        "#model", "data-model=", "#file", "#pick-data", "#look", "#f-adapter-type", "#f-model-storage-type",
        "#f-objective-type", "#f-num_train_epochs", "#f-optimizer-learning_rate", "#f-data-max_length",
        "#f-data-batch_size", "#f-data-validation_split", "#f-adapter-rank", "#f-adapter-alpha", "#f-adapter-dropout",
        "#search", "#command", "#yaml", "#read-yaml", "#save-yaml", "#save-llamafactory", "#estimate", "#go",
    ),
    "/runs/seen": ("#smoothing", "#raw", "#held", "#log", "/report", "/new?source=seen", "/compare?run=seen"),
    "/runs/seen/try": ("#which", "#open", "#system", "#temperature", "#top-p", "#max-tokens", "#add-picture"),
    "/runs/seen/measure": ("#p-data", "#p-which", "#p-samples", "#e-tasks"),
    "/runs/seen/export": ("#types-gguf", 'data-target="gptq"', 'data-target="awq"', 'data-target="merged"'),
}  # fmt: skip
"""The steps of LlamaBoard's tutorial, as docs/board.md places them: ids, or what stands in the page."""


def test_pages_use_no_name_that_nobody_gives_them() -> None:
    """A template that asks for another draws nothing there, and says nothing."""
    given: set[str] = set()
    for path in (*(BOARD / "routes").glob("*.py"), BOARD / "page.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                given |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif isinstance(node, ast.Dict):
                given |= {
                    key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
    environment = Texts("en").environment
    for path in (BOARD / "pages").glob("*.html"):
        text = path.read_text("utf-8")
        own = set(re.findall(r"{% (?:set|macro) (\w+)", text))
        assert meta.find_undeclared_variables(environment.parse(text)) <= given | own, path.name


def test_the_first_page_waits_for_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled when the board opens: a page's first request was the slowest by far."""
    compiled: list[str] = []
    compile_really = jinja2.Environment.compile

    def compile_and_note(self: Any, source: Any, name: Any = None, *rest: Any, **more: Any) -> Any:
        compiled.append(str(name))
        return compile_really(self, source, name, *rest, **more)

    monkeypatch.setattr(jinja2.Environment, "compile", compile_and_note)
    vars(texts)["_environment"].cache_clear()
    with board_on(tmp_path) as running, running.client() as http:
        for thread in threading.enumerate():
            if thread.name == PREPARING:
                thread.join()
        write_run(running, "seen")
        prepared = len(compiled)
        assert prepared == len(list((BOARD / "pages").glob("*.html")))
        for path in ("/", "/new", "/data", "/compare?run=seen", *PLACES):
            assert http.get(path).status_code == 200
        assert compiled[prepared:] == []


def test_a_search_shows_the_values_of_its_axes(shared: Running) -> None:
    write_sweep(write_run(shared, "axes"))
    with shared.client() as http:
        page = http.get("/runs/axes", headers={"Accept-Language": "zh-CN"}).text
    figure = page[page.index("<figure") : page.index("</figure>")]
    assert [text for text in re.findall(r'class="tick"[^>]*>([^<]*)<', figure) if not text.strip()] == []
    assert {"4", "64"} <= set(re.findall(r'class="tick"[^>]*>([^<]*)<', figure))
    assert Texts("zh")("field.adapter.rank") in figure


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_step_of_llamaboard_has_its_place(shared: Running, language: str) -> None:
    if not (shared.board.places.runs / "seen").exists():
        folder = write_run(shared, "seen")
        (folder / "report.html").write_text("", encoding="utf-8")
    with shared.client() as http:
        for path, places in PLACES.items():
            page = http.get(path, headers={"Accept-Language": language}).text
            ids = set(re.findall(r'id="([^"]+)"', page))
            missing = [place for place in places if (place[1:] not in ids if place[0] == "#" else place not in page)]
            assert missing == [], path


def test_the_table_of_llamaboard_is_the_same_in_both_languages() -> None:
    tables = [(DOCS / name).read_text("utf-8").split("LlamaBoard |", 1)[1] for name in ("board.md", "board.zh-CN.md")]
    assert [len(re.findall(r"^\| ", table, re.MULTILINE)) for table in tables] == [17, 17]
