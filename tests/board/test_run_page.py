"""The page of a run in a real browser: long curves, commands by the keyboard and in Chinese."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import lowrank.pipelines.live_commands
from lowrank.board.curves import CurvesOfRuns
from lowrank.checkpoints.live_commands import CommandQueue
from tests.board.browser import axe, page_of
from tests.board.english import raised, returned
from tests.board.run_folders import write_run
from tests.board.running import Running
from tests.board.test_live_commands import write_live
from tests.board.test_sentences import HAN, PLACE
from tests.processor_speed import slowness

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def running(shared: Running) -> Running:
    return shared


COLORS = """() => {
    const found = (places, name, mark, kind) => Object.fromEntries([...document.querySelectorAll(places)].map((one) => [
        one.querySelector(name).innerText, getComputedStyle(one.querySelector(mark))[kind]]));
    return [found("td:has(.swatch)", "strong", ".swatch", "backgroundColor"),
            found(".u-legend .u-series", ".u-label", ".u-marker", "borderTopColor")];
}"""
"""Of the table's adapters and of the plot's curves."""


def processor_seconds() -> float:
    """Of this process, which is the board, and of the browser's."""
    spent = [each.cpu_times() for each in psutil.Process().children(recursive=True) if "chrom" in each.name()]
    return time.process_time() + sum(each.user + each.system for each in spent)


def test_many_points_open_fast_and_zoom(browser: Any, running: Running) -> None:
    from playwright.sync_api import expect

    write_run(running, "long", points=100_000)
    with page_of(browser, running) as page:
        page.goto(f"{running.url}/runs/long")
        expect(page.locator("#plot-words")).to_contain_text("99999")
        running.board.curves = CurvesOfRuns()  # as after a restart: the file is read again
        before = processor_seconds()
        page.reload(wait_until="commit")
        expect(page.locator(".uplot canvas")).to_be_visible()
        took = processor_seconds() - before
        print(f"100,000 points: {took:.2f} processor seconds of board and browser until the curve is drawn")
        assert took < 1.0 * slowness()
        requests = page.evaluate("performance.getEntriesByType('resource').map((one) => one.name)")
        assert not [url for url in requests if url.endswith("/curves")]  # they came with the page
        box = page.locator(".u-over").bounding_box()
        page.mouse.move(box["x"] + 200, box["y"] + 50)
        page.mouse.down()
        with page.expect_response(re.compile(r"/curves\?low=")) as answer:
            page.mouse.move(box["x"] + 300, box["y"] + 60, steps=5)
            page.mouse.up()
        steps = answer.value.json()["jobs"]["default"]["steps"]
        assert 1000 < len(steps) <= 1200
        assert steps[-1] - steps[0] < 20_000  # a tenth of the run has as many points as the whole had
        expect(page.locator("#unzoom")).to_be_visible()
        page.locator("#log").check()
        page.click("#unzoom")
        expect(page.locator("#unzoom")).to_be_hidden()


def test_an_adapter_has_one_color_in_the_table_and_in_the_plot(browser: Any, running: Running) -> None:
    """Also where their names come in another order than they began."""
    folder = write_run(running, "colors", job="b")
    lines = (folder / "metrics.jsonl").read_text("utf-8")
    other = lines.replace('"job": "b"', '"job": "a"')
    (folder / "metrics.jsonl").write_text(lines + other, encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    summary["jobs"] = {"a": summary["jobs"]["b"], **summary["jobs"]}  # the summary lists them in its own order
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with page_of(browser, running) as page:
        page.goto(f"{running.url}/runs/colors")
        page.locator(".uplot canvas").wait_for()
        table, plot = page.evaluate(COLORS)
    assert table.keys() == {"a", "b"}
    assert table["a"] != table["b"]
    assert table == {name: plot[name] for name in table}


def test_a_run_is_steered_by_the_keyboard(browser: Any, running: Running) -> None:
    """The run is a thread of this test, which answers as runs do (the whole way steers a real one)."""
    from playwright.sync_api import expect

    live = write_live(running.board.places.runs / "live")
    over = threading.Event()

    def train() -> None:
        book = CommandQueue(live)
        while not over.wait(0.05):
            for command in book.due(3):
                book.acknowledge(command, 3, f"{command.kind} {command.job}", done=command.kind != "clone")

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with page_of(browser, running) as page:
            page.goto(f"{running.url}/runs/live")
            page.focus('[data-key="steer-r8"]')
            page.keyboard.press("Enter")
            expect(page.locator('#steer [data-kind="stop"] code')).to_have_text("lowrank stop runs/live r8")
            expect(page.locator('#steer [data-kind="resume"]')).to_be_hidden()
            assert axe(page) == []
            page.focus("#clone-rate")
            page.keyboard.type("fast")
            page.keyboard.press("Enter")
            expect(page.locator("#steer-answer.bad")).to_have_text("clone r8")
            page.keyboard.press("Escape")
            expect(page.locator('[data-key="steer-r8"]')).to_be_focused()
            page.focus("[data-add]")
            page.keyboard.press("Space")
            expect(page.locator("#add [data-give]")).to_be_disabled()
            page.fill("#add-name", "<i>r32</i>")
            page.locator("#add summary").click()
            page.fill("#add-more", "data: {train: [/etc/passwd]}")
            expect(page.locator("#add .problem")).to_contain_text("lies outside")
            page.fill("#add-more", "adapter: {rank: 32}")
            page.locator("#add [data-give]").click()
            expect(page.locator("#add-answer.well")).to_have_text("add <i>r32</i>")
            assert axe(page) == []
            page.keyboard.press("Escape")
            expect(page.locator("#details .given code").first).to_have_text("lowrank add runs/live '<i>r32</i>'")
    finally:
        over.set()
        trainer.join()
        (live / ".lowrank.json").write_text("{}", encoding="utf-8")  # nobody waits for the device any more


ENGLISH = """() => {
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        const place = node.parentElement;
        if (!place.checkVisibility() || place.closest("code, pre, textarea, script, [lang=en]")) continue;
        if (/[A-Za-z]{2,}(?: [a-z]{2,}){2,}/.test(node.data)) found.push(node.data.trim());
    }
    return found;
}"""
"""Sentences of a page, outside of what is marked as English or as the output of a command."""


def test_no_english_is_said_on_the_chinese_page(browser: Any, running: Running) -> None:
    """Every command through its dialog, with the run's own answers: done, and then refused."""
    from playwright.sync_api import expect

    handler = Path(str(lowrank.pipelines.live_commands.__file__))
    refusals = iter(sorted(set(raised(handler))))
    live = write_live(running.board.places.runs / "live-zh")
    over = threading.Event()

    def train() -> None:
        book = CommandQueue(live)
        while not over.wait(0.05):
            for command in book.due(3):
                done = list(returned(handler, "_join" if command.kind in ("add", "clone") else f"_{command.kind}"))
                text = f"{command.job} trains from now on" if command.kind in ("add", "clone") else done[0]
                second = command.number % 2 == 0
                book.acknowledge(command, 3, PLACE.sub("7", next(refusals) if second else text), done=not second)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with page_of(browser, running, "zh") as page:
            page.goto(f"{running.url}/runs/live-zh")
            for kind, fill in (("pause", None), ("stop", None), ("priority", "#steer-priority"), ("set", "#steer-rate"),
                               ("clone", "#clone-rate"), ("add", "#add-name")):  # fmt: skip
                page.locator("[data-add]" if kind == "add" else '[data-key="steer-r8"]').click()
                dialog = page.locator("#add" if kind == "add" else "#steer")
                for look in ("well", "bad"):
                    if fill:
                        page.fill(fill, "3")
                    button = dialog.locator(f'[data-kind="{kind}"] [data-give]')
                    expect(button).to_be_enabled()
                    button.click()
                    expect(dialog.locator(f"[role=status].{look}")).to_be_visible()
                    assert HAN.search(dialog.locator("[role=status]").inner_text())
                    assert page.evaluate(ENGLISH) == []
                more = dialog.locator(f'[data-kind="{kind}"] textarea')
                if more.count():  # what cannot be sent is shown at the field
                    dialog.locator(f'[data-kind="{kind}"] summary').click()
                    for wrong in ("data: {train: [/etc/passwd]}", "- 1", "adapter: evil:X"):
                        more.fill(wrong)
                        expect(dialog.locator(f'[data-kind="{kind}"] .problem')).to_have_text(HAN)
                        expect(button).to_be_disabled()
                        assert page.evaluate(ENGLISH) == []
                page.keyboard.press("Escape")
            assert len(page.locator("#details .given li").all()) == 12
            assert page.evaluate(ENGLISH) == []
    finally:
        over.set()
        trainer.join()
        (live / ".lowrank.json").write_text("{}", encoding="utf-8")
