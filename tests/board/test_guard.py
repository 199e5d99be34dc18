"""Authentication over a real socket; what a page of another site or a hostile name can do."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lowrank.board.state import Options
from tests.board.running import TOKEN, Running, board_on

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    (folder / "elsewhere").mkdir()
    with board_on(
        folder / "own", options=Options(upload_bytes=50_000, upload_seconds=1.5, header_seconds=1.5)
    ) as board:
        yield board


def test_nobody_comes_in_without_the_key(running: Running) -> None:
    with httpx.Client(base_url=running.url, trust_env=False) as http:
        assert http.get("/health").json() == {"status": "ok"}
        for path in ("/", "/new", "/api/fields", "/static/common.js", "/runs/x", "/nowhere", "/api/live"):
            assert http.get(path).status_code == 401
            assert http.get(path, params={"token": "wrong"}).status_code == 401
            assert http.get(path, headers={"Accept": "text/html"}).status_code == 401
        name = f"lowrank_board_{running.port}"
        for value in (TOKEN, "", "x", '"', "\\"):
            assert http.get("/", headers={"Cookie": f"{name}={value}"}).status_code == 401
        assert http.post("/api/draft/start", json={}).status_code == 401


def test_the_key_becomes_a_cookie_and_leaves_the_address(running: Running) -> None:
    with httpx.Client(base_url=running.url, trust_env=False) as http:
        answer = http.get("/data", params={"token": TOKEN})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        assert 'content="0;url=/data"' in answer.text
        assert TOKEN not in answer.text
        assert http.get("/data").status_code == 200
        assert 'url=/"' in http.get("//evil.example/", params={"token": TOKEN}).text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_was_pointed_at_us_is_refused(running: Running, host: str) -> None:
    with running.client() as http:
        for path in ("/", "/health"):
            assert http.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://127.0.0.1:1", "http://localhost", "file://", "javascript:1"]
)
def test_another_site_changes_nothing(running: Running, origin: str) -> None:
    with running.client() as http:
        before = len(running.board.queue.tasks.all())
        for path in ("/api/draft/start", "/api/upload?name=x.json", "/language/zh", "/api/worker/warm"):
            assert http.post(path, json={}, headers={"Origin": origin}).status_code == 403
        del http.headers["Origin"]
        assert http.post("/api/draft/start", json={}).status_code == 403
        assert len(running.board.queue.tasks.all()) == before
        for path in ("/api/draft/start", "/api/tasks/x/stop", "/language/zh"):
            assert http.get(path).status_code in (404, 405)  # nothing changes by looking at an address


def test_every_answer_is_dressed(running: Running) -> None:
    with running.client() as http:
        for path in ("/", "/new", "/static/common.js", "/api/fields", "/nowhere"):
            headers = http.get(path).headers
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert "server" not in headers


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e", "..%2f..%2fetc", "%2e%2e%2fx", ".board", ".lowrank.json", "a%00b", "a\\b", "a:b",
        "x" * 300, "con%0a", " a", "a ",
    ],
)  # fmt: skip
def test_names_lead_nowhere(running: Running, name: str) -> None:
    with running.client() as http:
        for pattern in (
            "/runs/{}",
            "/runs/{}/report",
            "/api/runs/{}/curves",
            "/tasks/{}",
            "/exports/{}/x",
            "/exports/x/{}",
        ):
            assert http.get(pattern.format(name)).status_code in (400, 404, 422)
        assert http.get(f"/static/{name}").status_code in (400, 404, 405)
    assert not (running.board.places.folder.parent / "x").exists()


def test_links_lead_nowhere(running: Running, folder: Path) -> None:
    secret = folder / "elsewhere" / "report.html"
    secret.write_text("secret", encoding="utf-8")
    own = running.board.places
    (own.runs / "link").symlink_to(secret.parent)
    (own.uploads / "link.json").symlink_to(secret)
    honest = own.runs / "honest"
    honest.mkdir()
    (honest / ".lowrank.json").write_text("{}", encoding="utf-8")
    (honest / "report.html").symlink_to(secret)
    own.exports.mkdir(exist_ok=True)
    (own.exports / "mine").mkdir()
    (own.exports / "mine" / "model.gguf").symlink_to(secret)
    with running.client() as http:
        for path in ("/runs/link", "/runs/link/report", "/runs/honest/report", "/exports/mine/model.gguf"):
            answer = http.get(path)
            assert answer.status_code in (400, 404), path
            assert "secret" not in answer.text
        assert "link.json" not in http.get("/data").text
        for path in (
            "data/link.json",
            "/etc/hosts.json",
            "../elsewhere/x.json",
            "~/x.json",
            "a\0b.json",
            ".board/token",
        ):
            assert http.post("/api/data/look", json={"path": path}).status_code == 400


def test_settings_stay_in_the_folders(running: Running) -> None:
    outside = ["/etc", "../elsewhere", "~", "runs/link"]
    link = running.board.places.runs / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    with running.client() as http:
        for path in outside:
            for values in (
                {"model.path": path, "data.train": ["lowrank/demo"]},
                {"model.path": "lowrank/tiny", "data.train": [path]},
                {"model.path": "lowrank/tiny", "data.train": [{"path": path}]},
                {"model.path": "lowrank/tiny", "data.eval": [path], "data.train": ["lowrank/demo"]},
                {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "adapter.path": path},
                {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "data.chat_template": f"{path}/x.jinja"},
                {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "data.tokenized_path": path},
                {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"], "objective.reference_model": path},
                {
                    "model.path": "lowrank/tiny",
                    "data.train": ["lowrank/demo"],
                    "sweep.candidates": [{"data.train": path}],
                },
                {"model.path": "lowrank/tiny", "sweep.grid": {"adapter": [{"path": path}]}},
                {"model.path": "lowrank/tiny", "sweep.random": {"data.train": {"choice": [[path]]}}},
            ):
                answer = http.post("/api/draft/start", json={"name": "x", "values": values})
                assert answer.status_code == 400, values
                assert "lies outside" in answer.json()["error"]["message"]
        jobs = [{"name": "a", "data.train": ["/etc/passwd"]}]
        values = {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"]}
        assert http.post("/api/draft/start", json={"name": "x", "values": values, "jobs": jobs}).status_code == 400
        extra = {"adapter": {"path": "/etc"}}
        assert http.post("/api/draft/start", json={"name": "x", "values": values, "extra": extra}).status_code == 400
        for name in ("../../evil", "/etc/evil", ".board", "a/b"):
            checked = http.post(
                "/api/draft/check", json={"name": name, "values": {**values, "model.path": "/etc"}}
            ).json()
            assert "/" not in checked["name"]
            assert not checked["name"].startswith(".")
    assert not running.board.queue.tasks.all()


@pytest.mark.parametrize(
    "name", ["evil.py", "evil", "x.json.py", "a.pkl", ".bashrc", "../evil.py", "x.pth", "x.so", "x.html"]
)
def test_only_data_is_taken(running: Running, name: str) -> None:
    with running.client() as http:
        assert http.post("/api/upload", params={"name": name}, content=b"import os").status_code == 400
    assert not [
        path for path in running.board.places.folder.rglob("*") if path.suffix in (".py", ".pth", ".so", ".pkl")
    ]


def test_uploads_keep_their_place(running: Running) -> None:
    with running.client() as http:
        for name in ("rows.json", "../../rows.json", "C:\\x\\rows.json"):
            answer = http.post("/api/upload", params={"name": name}, content=b"[]")
            assert answer.json()["path"] == "data/rows.json" or answer.json()["path"].startswith("data/rows-")
        assert len(list(running.board.places.uploads.glob("rows*.json"))) == 3  # none over another
        assert http.post("/api/upload", params={"name": f"{EVIL}.json"}, content=b"[]").status_code == 200
        page = http.get("/data").text
        assert EVIL not in page
        assert http.post("/api/upload", params={"name": "empty.json"}, content=b"").status_code == 400


def test_giant_and_slow_uploads_end(running: Running) -> None:
    with running.client() as http:
        assert http.post("/api/upload", params={"name": "a.json"}, content=b"x" * 60_000).status_code == 413
        pieces = (b"x" * 1000 for _ in range(100))  # without a length
        assert http.post("/api/upload", params={"name": "a.json"}, content=pieces).status_code == 413
        cookie = f"lowrank_board_{running.port}={http.cookies[f'lowrank_board_{running.port}']}"
    head = f"POST /api/upload?name=a.json HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nOrigin: {running.url}\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as slow:
        slow.sendall(f"{head}Cookie: {cookie}\r\nContent-Length: 100\r\n\r\n[".encode())
        begun = time.monotonic()
        assert b" 408 " in slow.recv(4096)
        assert 1 < time.monotonic() - begun < 8
    assert not [
        path for path in running.board.places.uploads.iterdir() if "partial" in path.name or path.name == "a.json"
    ]


def test_a_header_that_never_ends_is_cut_off(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
        begun = time.monotonic()
        assert b" 200 " not in slow.recv(4096)
        assert 1 < time.monotonic() - begun < 8


def test_many_open_streams_leave_the_page_alone(running: Running) -> None:
    """A thousand ask for a stream; those beyond the limit are told to come back, and pages are answered meanwhile."""
    with running.client() as http:
        cookie = f"lowrank_board_{running.port}={http.cookies[f'lowrank_board_{running.port}']}"
    request = f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nCookie: {cookie}\r\n\r\n".encode()
    streams: list[socket.socket] = []
    statuses: list[bytes] = []
    try:
        for _ in range(1000):
            stream = socket.create_connection(("127.0.0.1", running.port), timeout=20)
            streams.append(stream)
            stream.sendall(request)
            statuses.append(stream.recv(12))
        assert statuses.count(b"HTTP/1.1 200") <= running.board.options.streams
        assert statuses.count(b"HTTP/1.1 503") >= 1000 - running.board.options.streams
    finally:
        for stream in streams:
            stream.close()
    deadline = time.monotonic() + 15
    while True:
        with httpx.Client(base_url=running.url, trust_env=False) as http:
            if http.get("/", headers={"Cookie": cookie}).status_code == 200:
                break
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_evil_yaml_and_malformed_bodies(running: Running) -> None:
    with running.client() as http:
        for body in (b"{", b"[]", b"\xff", b"[" * 50_000, b'{"values": []}', b'{"jobs": {"a": 1}}', b'{"text": 3}'):
            for path in ("/api/draft/check", "/api/draft/start", "/api/draft/read", "/api/tasks/x/move"):
                answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
                assert answer.status_code in (400, 404, 422), (path, body[:20], answer.status_code)
        assert http.post("/api/draft/read", json={"text": "x" * 300_000}).status_code == 413
        half = b'{"values": {"data.default_system": "\\ud800", "model.path": "lowrank/tiny"}}'
        deep = b'{"values": {"a": ' + b"[" * 400 + b"]" * 400 + b"}}"
        for body in (half, b'{"\\udfff": 1}', b'{"name": "\\ud800"}', deep):
            answer = http.post("/api/draft/start", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422


def test_names_of_runs_and_jobs_are_text(running: Running) -> None:
    folder = running.board.places.runs / "i'm & bold"
    folder.mkdir()
    config = {"model": {"path": EVIL}, "adapter": {"rank": EVIL}, "jobs": [{"name": EVIL}]}
    summary = {"jobs": {EVIL: {"description": EVIL, "verdict": {"kind": EVIL, "sentence": EVIL}}}, "best_job": EVIL}
    for name, content in ((".lowrank.json", {"owned": [EVIL]}), ("config.json", config), ("summary.json", summary)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    line = {"event": "notice", "job": EVIL, "level": "warning", "text": EVIL, "step": 0}
    step = {"event": "step", "job": EVIL, "step": 1, "loss": 1.0, "learning_rate": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(step) + "\n", encoding="utf-8")
    with running.client() as http:
        for path in ("", "/try", "/measure", "/export"):
            page = http.get(f"/runs/{folder.name}{path}")
            assert page.status_code == 200
            assert EVIL not in page.text
        for path in ("/", "/compare?run=i%27m%20%26%20bold", "/new?source=i%27m%20%26%20bold"):
            page = http.get(path)
            assert page.status_code == 200
            assert EVIL not in page.text


def test_the_report_is_in_a_sandbox(running: Running) -> None:
    folder = running.board.places.runs / "reported"
    folder.mkdir()
    (folder / ".lowrank.json").write_text("{}", encoding="utf-8")
    (folder / "report.html").write_text("<script>1</script>", encoding="utf-8")
    with running.client() as http:
        policy = http.get("/runs/reported/report").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in policy
    assert "default-src 'none'" in policy


def test_secrets_are_for_their_owner_alone(running: Running) -> None:
    assert os.stat(running.board.places.own / "serve_token").st_mode & 0o077 == 0


def test_threads_do_not_pile_up(running: Running) -> None:
    assert threading.active_count() < 80
