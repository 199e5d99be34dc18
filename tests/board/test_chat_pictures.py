"""Pictures in a conversation: chosen, pasted, dropped and sent with the question, on a tiny base that sees."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from lowrank.board.sentences import in_chinese
from lowrank.board.texts import Texts
from tests import command_line
from tests.board.browser import axe, page_of
from tests.board.running import Running
from tests.picture_rows import write_picture_rows
from tests.tiny_vision_models import save_vision_folder

pytestmark = pytest.mark.timeout(600)
EVIL = "<img src=x onerror=document.title='evil'>.png"
PASTE = """([name, bytes, kind, event]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
    const place = document.getElementById(event === "paste" ? "question" : "ask");
    place.dispatchEvent(event === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def seeing(shared: Running) -> Running:
    """The board, with a run on pictures."""
    folder = shared.board.places.folder
    save_vision_folder(folder / "base", "qwen3_vl")
    write_picture_rows(folder / "data")
    arguments = (
        "train",
        "model=base",
        "data=data/mllm.json",
        "max_steps=1",
        "output_dir=runs/sees",
        "model.dtype=float32",
    )
    ran = command_line.lowrank(*arguments, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return shared


def picture(seed: int, size: tuple[int, int] = (60, 40), kind: str = "PNG") -> bytes:
    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(value).save(file, kind)
    return file.getvalue()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def talking(browser: Any, seeing: Running) -> Iterator[Any]:
    """The page of a conversation whose model is loaded, and what it asks."""
    from playwright.sync_api import expect

    with page_of(browser, seeing, "zh") as page:
        page.sent = []
        page.on(
            "request", lambda request: page.sent.append(request.post_data) if request.url.endswith("/say") else None
        )
        page.goto(f"{seeing.url}/runs/sees/try")
        page.click("#open")
        expect(page.locator("#add-picture")).to_be_visible(timeout=120_000)
        page.locator("summary").click()
        page.fill("#max-tokens", "6")
        page.fill("#temperature", "0")
        yield page


def test_a_picture_goes_with_the_question(talking: Any, seeing: Running) -> None:
    """By button, paste and drop; the server is asked about the bytes of the files, and its answer is shown."""
    from playwright.sync_api import expect

    files = [picture(seed) for seed in range(3)]
    talking.set_input_files("#picture-file", {"name": EVIL, "mimeType": "image/png", "buffer": files[0]})
    talking.evaluate(PASTE, ["image.png", list(files[1]), "image/png", "paste"])
    talking.evaluate(PASTE, ["c.png", list(files[2]), "image/png", "drop"])
    expect(talking.locator("#pictures img")).to_have_count(3)
    assert EVIL in str(talking.locator("#pictures img").first.get_attribute("alt"))
    assert axe(talking) == []
    talking.locator("#pictures button").last.focus()  # the keyboard is enough
    talking.keyboard.press("Enter")
    expect(talking.locator("#pictures img")).to_have_count(2)
    talking.fill("#question", "图里有什么？")
    talking.keyboard.press("Enter")
    expect(talking.locator(".turn .pictures img")).to_have_count(2)
    expect(talking.locator(".answer h3 .small")).to_have_count(2)
    expect(talking.locator(".answer.base h3 .small")).to_contain_text("tok/s")
    expect(talking.locator("#pictures")).to_be_hidden()
    assert axe(talking) == []
    sent = [json.loads(each) for each in talking.sent]
    assert [one["model"] for one in sent] == ["default", "base"]
    content = [*({"type": "image_url", "image_url": {"url": url_of(data)}} for data in files[:2]),
               {"type": "text", "text": "图里有什么？"}]  # fmt: skip
    for one in sent:
        assert one["messages"] == [{"role": "user", "content": content}]
    direct = answer_of_openai(
        seeing, {"model": "base", "messages": sent[1]["messages"], "temperature": 0, "max_tokens": 6}
    )
    shown = talking.locator(".answer.base .text").inner_text()
    assert shown in (direct["choices"][0]["message"]["content"].strip(), Texts("zh")("js.chat.empty"))
    without = answer_of_openai(
        seeing, {"model": "base", "messages": [{"role": "user", "content": "图里有什么？"}], "max_tokens": 1}
    )
    assert direct["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    assert talking.title() != "evil"


def answer_of_openai(seeing: Running, content: dict[str, Any]) -> Any:
    """What the server behind the page answers to a client of OpenAI's API."""
    (task,) = (task for task in seeing.board.queue.running() if task.kind == "serve")
    output = (seeing.board.queue.tasks.folder(task.id) / "output.jsonl").read_text("utf-8")
    port = re.findall(r"127\.0\.0\.1:(\d+)", output)[0]
    headers = {"Authorization": f"Bearer {seeing.board.serve_token}"}
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions", json=content, headers=headers, timeout=60, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_large_picture_is_shrunk_and_what_is_none_is_refused(talking: Any) -> None:
    from playwright.sync_api import expect

    talking.click("#again")
    talking.sent.clear()
    large = picture(1, (2600, 1700), "JPEG")
    talking.set_input_files("#picture-file", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": large})
    expect(talking.locator("#pictures img")).to_have_attribute("title", re.compile("2048 × 1339"))
    for name, kind, data in (
        ("cut.png", "image/png", picture(1)[:40]), ("words.png", "image/png", b"no picture"),
        ("evil.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ):  # fmt: skip
        talking.set_input_files("#picture-file", {"name": name, "mimeType": kind, "buffer": data})
        expect(talking.locator(".toast.bad", has_text=name)).to_be_visible()
    expect(talking.locator("#pictures img")).to_have_count(1)
    talking.locator("#models input[value=default]").uncheck()
    talking.click("#send")  # a picture alone is a question
    expect(talking.locator(".answer.base h3 .small")).to_contain_text("tok/s")
    (sent,) = (json.loads(each) for each in talking.sent)
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("JPEG", (2048, 1339))
    talking.locator("#models input[value=default]").check()


REFUSED: list[Any] = [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AAAA"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA AA"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}},
    {"type": "image_url", "image_url": {}}, {"type": "image_url"}, {"type": "image", "path": "/etc/passwd"},
    {"type": "text", "text": "a", "image_url": {"url": url_of(b"x")}}, {"type": "input_audio"}, "text", None,
]  # fmt: skip


@pytest.mark.parametrize("part", REFUSED, ids=lambda part: json.dumps(part)[:60])
def test_nothing_but_pictures_of_the_page_goes_through(shared: Running, part: Any) -> None:
    with shared.client() as http:
        body = {"model": "base", "messages": [{"role": "user", "content": [part]}]}
        assert http.post("/api/chat/none/say", json=body).status_code == 422


def test_bytes_that_only_claim_to_be_a_picture(talking: Any, seeing: Running) -> None:
    """The page never sends them; another client's are refused by the server, in the words of the page."""
    (task,) = (task for task in seeing.board.queue.running() if task.kind == "serve")
    claims = np.frombuffer(picture(1), np.uint8).copy()
    claims[16:24] = np.frombuffer((99_999).to_bytes(4, "big") * 2, np.uint8)  # width and height in PNG's header
    with seeing.client() as http:
        http.headers["Accept-Language"] = "zh-CN"
        for data in (b"GIF89a nothing", picture(1)[:-20], claims.tobytes()):
            content = [{"type": "image_url", "image_url": {"url": url_of(data)}}]
            body = {"model": "base", "messages": [{"role": "user", "content": content}]}
            answer = http.post(f"/api/chat/{task.id}/say", json=body)
            assert answer.status_code == 502
            assert re.search(r"[\u4e00-\u9fff]", answer.json()["error"]["message"])
        many = [{"type": "image_url", "image_url": {"url": url_of(picture(1))}}] * 17
        answer = http.post(
            f"/api/chat/{task.id}/say", json={"model": "base", "messages": [{"role": "user", "content": many}]}
        )
        assert "最多 16 张" in answer.json()["error"]["message"]
        large = http.post(f"/api/chat/{task.id}/say", content=b"x" * (25 << 20))
        assert large.status_code == 413
        elsewhere = http.post("/api/draft/check", content=b"x" * (5 << 20))
        assert elsewhere.status_code == 413
    refusal = "messages[0].content: unsupported content image_url: no images are read here (the base reads text only), "
    assert in_chinese(f"{refusal}no URL is ever fetched") == "这个模型不能看图片（基座只能读文字）"


def test_measured_answers_stand_beside_what_was_shown(browser: Any, seeing: Running) -> None:
    from playwright.sync_api import expect

    folder = seeing.board.places.folder
    predicting = ("predict", "runs/sees", "--data", "data/mllm.json", "--max-new-tokens", "2", "--max-samples", "3")
    ran = command_line.lowrank(*predicting, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    (saved,) = (folder / "runs/sees/predict").glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    rows[0]["prompt"][0]["images"].append(EVIL)  # gone since, and no markup
    strange = {"prompt": [{"role": "user", "content": "?", "images": 3}], "label": "", "predictions": {"base": "a"}}
    saved.write_text("".join(json.dumps(row) + "\n" for row in [*rows, strange, 7]), encoding="utf-8")
    with page_of(browser, seeing, "en") as page:
        page.goto(f"{seeing.url}/runs/sees/measure")
        expect(page.locator("th", has_text=Texts("en")("measure.before"))).to_be_visible()
        expect(page.locator(".bad", has_text=Texts("en")("measure.strange", number=1))).to_be_visible()
        shown = page.locator("details .pictures img")
        names = [name for row in rows for message in row["prompt"] for name in message.get("images", ())]
        expect(shown).to_have_count(len(names) - 1)
        page.locator("details[open] .pictures img").first.scroll_into_view_if_needed()
        expect(page.locator("details[open] .pictures img").first).to_have_js_property("naturalWidth", 160)
        assert page.locator(".pictures li", has_text=EVIL).count() == 1
        assert page.title() != "evil"
        assert axe(page) == []
