"""What a person does, in a real browser, offline: from a file of rows to a GGUF file, in both languages."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.board.texts import Texts
from tests.board.browser import axe, page_of
from tests.board.run_folders import write_run, write_sweep
from tests.board.running import Running

pytestmark = pytest.mark.timeout(600)
ROWS = [{"instruction": f"Say {number} in words", "input": "", "output": f"number {number}"} for number in range(120)]
EVIL = "<img src=x onerror=document.title='evil'>"


@pytest.fixture(scope="module")
def running(shared: Running) -> Running:
    return shared


@pytest.fixture(scope="module")
def folder(shared: Running) -> Path:
    return shared.board.places.folder


def write_rows(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps([*ROWS, {"instruction": "", "output": EVIL}]), encoding="utf-8")
    return path


@pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=pytest.mark.slow)])
def test_a_persons_whole_way(browser: Any, running: Running, folder: Path, tmp_path: Path, language: str) -> None:
    from playwright.sync_api import expect

    t = Texts(language)
    name = f"way-{language}"
    with page_of(browser, running, language) as page:
        # upload, look
        page.get_by_role("link", name=t("start.new"), exact=True).first.click()
        page.locator('[data-model="lowrank/tiny"]').click()
        page.set_input_files("#file", write_rows(tmp_path))
        expect(page.locator("#look mark").nth(1)).to_contain_text("number 0", timeout=120_000)
        expect(page.locator("#look .box.bad")).to_contain_text("row 121" if language == "en" else "第 121 行")
        # set, estimate
        page.locator('[data-preset="quick"]').click()
        page.fill("#name", name)
        page.fill("#f-adapter-rank", "abc")
        expect(page.locator('[data-problem="adapter.rank"]')).to_contain_text(
            "whole number" if language == "en" else "应为整数"
        )
        page.fill("#f-adapter-rank", "8")
        page.fill("#search", "logging")
        page.locator("#results button").first.click()
        page.locator('#others [data-path="max_steps"]').fill("100000")
        expect(page.locator("#problems .good")).to_have_text(f"✓ {t('js.valid')}")
        if language == "zh":  # it takes ten seconds alone
            page.click("#estimate")
            expect(page.locator("#plan strong")).to_have_text(t("js.plan.fits"), timeout=300_000)
        page.locator("aside summary", has_text=t("command")).click()
        expect(page.locator("#command")).to_contain_text("adapter.rank=8")
        # start, watch, reload
        page.click("#go")
        page.wait_for_url(re.compile(f"/runs/{name}"))
        expect(page.locator("#plot-words")).to_contain_text(
            t("js.curve_summary", label="default", step="", loss="")[:7], timeout=120_000
        )
        before = int(re.findall(r"\d+", page.locator("#plot-words").inner_text())[0])
        page.reload()
        end = time.monotonic() + 60
        while not (found := re.findall(r"\d+", page.locator("#plot-words").inner_text())) or int(found[0]) <= before:
            assert time.monotonic() < end, "the curve does not go on"
            page.wait_for_timeout(200)
        # steer, stop, go on
        page.locator('[data-steer="default"]').click()
        page.fill("#steer-rate", "1e-4")
        expect(page.locator('#steer [data-kind="set"] code')).to_have_text(
            f"lowrank set runs/{name} default optimizer.learning_rate=0.0001"
        )
        page.keyboard.press("Enter")
        shown = "optimizer.learning_rate=0.0001 from step" if language == "en" else "optimizer.learning_rate=0.0001"
        expect(page.locator("#steer-answer.well")).to_contain_text(shown)
        page.keyboard.press("Escape")
        expect(page.locator('[data-steer="default"]')).to_be_focused()
        page.get_by_role("button", name=t("stop.save")).click()
        expect(page.locator("#head .state")).to_have_text(t("state.stopped"))
        page.get_by_role("button", name=t("run.resume")).click()
        expect(page.locator("#head .state")).to_have_text(t("state.running"))
        page.get_by_role("button", name=t("stop.save")).click()
        expect(page.locator("#head .state")).to_have_text(t("state.stopped"))
        # talk
        page.get_by_role("link", name=t("tab.try")).click()
        page.click("#open")
        expect(page.locator("#add-picture")).to_be_hidden()  # it reads text only
        page.locator("#question").fill("Say 3 in words")
        page.fill("#max-tokens", "8") if page.locator("#max-tokens").is_visible() else None
        page.keyboard.press("Enter")
        expect(page.locator(".answer h3 .small")).to_have_count(2)
        expect(page.locator(".answer").first.locator("h3")).to_contain_text("tok/s")
        expect(page.locator(".answer.base h3")).to_contain_text("tok/s")
        page.click("#close")
        # measure
        page.get_by_role("link", name=t("tab.measure")).click()
        page.fill("#p-data", "data/rows.json")
        page.fill("#p-samples", "3")
        page.fill("#p-tokens", "8")
        page.get_by_role("button", name=t("measure.go")).first.click()
        expect(page.locator("th", has_text=t("measure.before"))).to_be_visible(timeout=120_000)
        # export
        page.get_by_role("link", name=t("tab.export")).click()
        page.select_option("#types-gguf", "f16")  # how far 8 bits are away depends on how far this run came
        page.locator('form[data-target="gguf"] button').click()
        expect(page.locator(".taken .good")).to_contain_text(t("export.passed"), timeout=120_000)
        with page.expect_download() as download:
            page.locator(".files a", has_text=".gguf").click()
        assert Path(download.value.path()).read_bytes()[:4] == b"GGUF"
        assert "evil" not in page.title()


def test_pairs_are_shown_as_chosen_and_rejected(browser: Any, running: Running, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    pairs = [
        {"instruction": f"Say {number}", "input": "", "chosen": f"number {number}", "rejected": "no"}
        for number in range(8)
    ]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(pairs), encoding="utf-8")
    with page_of(browser, running, "zh") as page:
        page.goto(f"{running.url}/new")
        page.locator('[data-model="lowrank/tiny"]').click()
        page.set_input_files("#file", file)
        expect(page.locator("#look pre.sample")).to_have_count(4, timeout=120_000)
        labels = page.locator("#look p.dim.small").all_inner_texts()
        assert [text for text in labels if text in ("优选回答", "被拒回答")] == ["优选回答", "被拒回答"] * 2


def test_two_people_and_names_that_would_be_markup(browser: Any, running: Running) -> None:
    from playwright.sync_api import expect

    write_run(running, "hostile", job=EVIL)
    task = running.board.queue.add("train", ["train", f"{EVIL}.yaml"], subject="waits")
    running.board.queue.stop(task.id)
    first = running.board.queue.add("x", ["no-such-command", EVIL], subject="noise")
    with page_of(browser, running) as one, page_of(browser, running, "zh") as two:
        for page in (one, two):
            page.goto(f"{running.url}/runs/hostile")
            expect(page.locator("#plot-words")).to_contain_text("onerror")
            page.goto(f"{running.url}/tasks/{first.id}")
            expect(page.locator(".state.failed")).to_be_visible()
            assert page.title() != "evil"
        one.goto(running.url)
        two.goto(running.url)
        added = running.board.queue.add("x", ["no-such-command-2"], subject="seen by both")
        for page in (one, two):
            expect(page.get_by_text("seen by both").first).to_be_visible()
        running.board.queue.tasks.remove(added)
        assert two.locator("h1").inner_text() == Texts("zh")("start.title")


def test_a_search_is_set_up(browser: Any, running: Running) -> None:
    from playwright.sync_api import expect

    with page_of(browser, running) as page:
        page.goto(f"{running.url}/new")
        page.locator('[data-model="lowrank/tiny"]').click()
        page.fill("#pick-data", "lowrank/demo")
        page.click("#add-data")
        page.click("#sweep-usual")
        expect(page.locator("#sweep-count")).to_have_text("9 candidates")
        page.click("#add-sweep")
        page.select_option("#sweep tbody tr:last-child td:nth-child(1) select", "adapter.dropout")
        page.select_option("#sweep tbody tr:last-child td:nth-child(2) select", "uniform")
        page.fill("#sweep tbody tr:last-child input", "0, 0.2")
        expect(page.locator('[data-problem="sweep"]')).to_contain_text("say how many candidates")
        page.fill("#f-sweep-max_trials", "12")
        expect(page.locator("#problems .good")).to_be_visible()
        expect(page.locator("#sweep-count")).to_have_text("12 candidates")
        assert yaml.safe_load(page.input_value("#yaml"))["sweep"] == {
            "grid": {"adapter.rank": [8, 16, 64], "optimizer.learning_rate": [0.0001, 0.0003, 0.001]},
            "random": {"adapter.dropout": {"uniform": [0, 0.2]}},
            "max_trials": 12,
        }
        assert axe(page) == []


PAGES = (
    "/", "/new", "/data", "/compare", "/compare?run=seen&run=other", "/runs/seen", "/runs/seen/try",
    "/runs/seen/measure", "/runs/seen/export",
)  # fmt: skip


WIDE = """(width) => [...document.querySelectorAll("main *")]
    .filter((one) => one.getBoundingClientRect().right > width && !one.closest(".scroll > *, .plot"))
    .map((one) => one.outerHTML.slice(0, 120)).slice(0, 5)"""


def test_axe_finds_nothing_and_nothing_overflows_a_phone(browser: Any, running: Running) -> None:
    write_run(running, "seen")
    write_sweep(running.board.places.runs / "seen")
    write_run(running, "other", points=30)
    found = {}
    for language, scheme, width in (("en", "light", 1280), ("zh", "dark", 390)):
        with page_of(browser, running, language, color_scheme=scheme) as page:
            page.set_viewport_size({"width": width, "height": 800})
            for path in PAGES:
                page.goto(running.url + path)
                if path == "/new":
                    page.locator("#problems > *").wait_for()
                    page.click("#add-job")
                    page.click("#sweep-usual")
                    page.fill("#search", "rank")
                found[f"{path} {language}"] = axe(page)
                wide = page.evaluate(WIDE, width)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path}: {wide}"
    assert not {path: wrong for path, wrong in found.items() if wrong}


def test_what_is_chosen_while_the_page_loads_is_kept(browser: Any, running: Running) -> None:
    """The fields come a second late; the model was chosen before."""
    with page_of(browser, running) as page:
        page.route("**/api/fields", lambda route: (time.sleep(1), route.continue_()))
        page.goto(f"{running.url}/new", wait_until="domcontentloaded")  # its script runs, the fields are not there
        page.locator('[data-model="lowrank/tiny"]').click()
        assert page.input_value("#f-adapter-rank") == "16"  # what came with the page is shown with it
        page.locator("#problems > *").wait_for()
        assert page.input_value("#model") == "lowrank/tiny"
        assert page.input_value("#f-adapter-rank") == "16"


def test_the_keyboard_is_enough(browser: Any, running: Running) -> None:
    """From the first Tab to a chosen starting point, without a mouse; what has the focus can be seen."""
    with page_of(browser, running) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('href')") == "/new":
                break
        page.keyboard.press("Enter")
        page.wait_for_url("**/new")
        page.locator("#problems > *").wait_for()
        page.focus("#model")
        page.keyboard.type("lowrank/tiny")
        for _ in range(40):
            page.keyboard.press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            hidden = page.evaluate("document.activeElement.matches('.hidden')")
            assert outline != "none" or hidden
            if page.evaluate("document.activeElement.dataset.preset") == "best":
                break
        page.keyboard.press("Space")
        assert page.input_value("#f-adapter-rank") == "64"
        assert page.input_value("#f-adapter-type") == "dora"


def test_the_policy_holds(browser: Any, running: Running) -> None:
    """No script in the page itself, by whatever way it came there: the browser refuses it, and says so."""
    with page_of(browser, running, refused=True) as page:
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
        script = (
            "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
        )
        page.evaluate(script)
        page.wait_for_timeout(300)
        assert page.title() == "lowrank"
        assert page.evaluate("document.cookie") == ""
