"""Debian's Chromium, driven by playwright, with everything outside of this machine blocked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.board.running import TOKEN, Running

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


def chromium() -> str:
    """Its path. Without it a test is skipped, but on CI (`CI=true`) it fails: a skip there would be silent."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        message = "needs Chromium: apt-get install chromium fonts-wqy-microhei (.ci/run does)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@contextmanager
def opened() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[OFFLINE])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(
    browser: Any, running: Running, language: str = "en", *, refused: bool = False, **options: Any
) -> Iterator[Any]:
    """A page that has been let in. What its console complains of, or it asks of other hosts, fails the test; with
    `refused` the policy must have had something to complain of.
    """
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    locale = "zh-CN" if language == "zh" else "en-US"
    context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 900}, **options)
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((running.url, "blob:")) else complaints.append(request.url),
    )
    try:
        page.goto(f"{running.url}/?token={TOKEN}")
        page.wait_for_url(f"{running.url}/")
        yield page
        if refused:
            assert any("Content Security Policy" in message for message in complaints)
        else:
            assert not complaints
    finally:
        context.close()


def axe(page: Any) -> list[str]:
    """What axe finds wrong with a page: its rule and the elements."""
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("async () => (await axe.run(document)).violations")
    return [f"{each['id']}: {[node['html'][:120] for node in each['nodes'][:3]]}" for each in found]
