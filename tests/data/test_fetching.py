"""Media behind URLs: fetched once where the person allows it, from public addresses alone, within limits."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from lowrank.data.chat.characters import CharacterRenderer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import examine
from lowrank.data.report.doctor import DataReport
from lowrank.media import fetching
from lowrank.media.decoding import BadImage
from lowrank.media.decoding import examine as examine_picture

MOST = 100_000


def photograph() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """`/cat.png`, and what strangers' servers do."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Site.requests.append(f"{self.headers['Host']}{self.path}")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(10_000))
        elif self.path in ("/drips", "/drips-headers"):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if self.path == "/drips" else b"X: "))
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif self.path == "/cat.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photograph())
        elif self.path in ("/busy.png", "/half.png"):
            self.send_response(200)
            self.end_headers()
            first = len([each for each in Site.requests if each.endswith(self.path)]) == 1
            bad = b"<html>too many requests" if self.path == "/busy.png" else photograph()[:-30]
            self.wfile.write(bad if first else photograph())
        else:
            self.send_error(404)

    def log_message(self, *given: Any) -> None:
        del given


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, under the name `photos.test`, which counts as public here; no other private address does."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    look_up, is_public = socket.getaddrinfo, fetching._is_public  # pyright: ignore[reportPrivateUsage]

    def found(host: str, *rest: Any, **named: Any) -> Any:
        return look_up("127.0.0.1" if host == "photos.test" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(fetching, "_is_public", lambda text: text == "127.0.0.1" or is_public(text))
    Site.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://photos.test:{server.server_address[1]}"
        server.shutdown()


def read(tmp_path: Path, url: str, **settings: Any) -> DataReport:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": turns, "images": [url]}]), encoding="utf-8")
    return examine(DataConfig(train=(SourceConfig(path=str(path), **settings),)), renderer=CharacterRenderer())


def test_a_url_is_fetched_once_and_only_where_the_person_says_so(site: str, tmp_path: Path) -> None:
    (loss,) = read(tmp_path, f"{site}/cat.png").losses
    assert "nothing is fetched unless you say so" in loss
    assert not Site.requests
    for _ in range(2):
        (dataset,) = read(tmp_path, f"{site}/to/{site}/cat.png", fetch_media=True).datasets
        assert (dataset.used, dataset.pictures) == (1, 1)
    assert len(Site.requests) == 2
    assert all(each.startswith("photos.test:") for each in Site.requests)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/none.png", "photos.test answers 404"),
        ("/large", "it has more than 0 MB"),
        ("/to/http://127.0.0.2/cat.png", "127.0.0.2 is at 127.0.0.2, which is no public address"),
        ("/to/http://[::1]/cat.png", "no public address"),
        ("/to/http://169.254.169.254/latest", "169.254.169.254, which is no public address"),
        ("/to/file:///etc/passwd", "only http and https are fetched, not 'file'"),
        ("/to//to//to//to//to//to//to//to/", "more than 5 redirects"),
    ],
)
def test_what_is_not_fetched(path: str, problem: str, site: str) -> None:
    with pytest.raises(BadImage, match="a picture cannot be fetched") as caught:
        fetching.fetched(site + path, "it", MOST, BadImage, examine_picture)
    assert problem in str(caught.value)


@pytest.mark.parametrize(("path", "problem"), [("/busy.png", "not a picture"), ("/half.png", "is cut off")])
def test_what_is_no_picture_is_not_kept(path: str, problem: str, site: str, tmp_path: Path) -> None:
    """A server that was busy, or broke off, is asked again by the next command."""
    (loss,) = read(tmp_path, site + path, fetch_media=True).losses
    assert problem in loss
    (dataset,) = read(tmp_path, site + path, fetch_media=True).datasets
    assert dataset.used == 1


def test_a_cache_that_cannot_be_written_is_named(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file"))
    (loss,) = read(tmp_path, f"{site}/cat.png", fetch_media=True).losses
    assert re.search(r"row 1.*a picture cannot be fetched: .*file/media \(LOWRANK_CACHE\) cannot be written", loss)


@pytest.mark.parametrize("path", ["/drips", "/drips-headers"])
def test_what_never_ends_has_its_time(path: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(BadImage, match="it was not there after"):
        fetching.fetched(site + path, "it", MOST, BadImage, examine_picture)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("scheme", ["ftp", "hf", "gopher"])
def test_other_schemes_are_named(scheme: str, tmp_path: Path) -> None:
    (loss,) = read(tmp_path, f"{scheme}://example.org/cat.png", fetch_media=True).losses
    assert f"only http and https are fetched, not '{scheme}'" in loss


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "100.64.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:a00:1::1", "64:ff9b::a00:1", "::"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not fetching._is_public(address)  # pyright: ignore[reportPrivateUsage]
    assert fetching._is_public("93.184.215.14")  # pyright: ignore[reportPrivateUsage]
    assert fetching._is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")  # pyright: ignore[reportPrivateUsage]
