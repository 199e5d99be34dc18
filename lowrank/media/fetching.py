"""Media behind URLs, where the person allows it for a dataset: each is fetched once, into the cache folder.

Rows are strangers, who could name what only this machine reaches: a router, a cloud's metadata, a service of its own.
So only http and https are spoken, to public addresses alone, and the address that was looked at is the one that is
connected to, at every redirect anew; a proxy, which would look names up itself, is not asked. What comes is limited in
bytes and time, is not decompressed, and is examined like any other file.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from lowrank.kernels.cache_folder import cache_folder
from lowrank.media.medium_files import BadMedium, digest_of

FOLDER = "media"
"""Of the cache folder."""
_SECONDS = 60.0
"""For one medium in all."""
_PATIENCE = 10.0
"""Seconds without a byte."""
_MOST_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetched(url: str, name: str, most: int, error: type[BadMedium], check: Callable[[bytes, str], object]) -> Path:
    """The file of what is at `url`, `name` for people, as it was when it was first asked for. `error` where it cannot
    be had or kept, is more than `most` bytes, or not at a public address. `check` raises for what is not to be kept: a
    server's page about an error, half a file; it is asked for again the next time."""
    path = cache_folder() / FOLDER / digest_of(url.encode("utf-8", "surrogatepass"))
    if path.is_file():
        return path
    try:
        data = _read(url, most)
    except _Refused as problem:
        raise error(f"{error.one} cannot be fetched", f"{name}: {problem}") from problem
    check(data, name)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as problem:
        with suppress(OSError):
            partial.unlink()
        where = f"{path.parent} (LOWRANK_CACHE) cannot be written: {problem.strerror}"
        raise error(f"{error.one} cannot be fetched", f"{name}: {where}") from problem
    return path


class _Refused(Exception):
    """In words."""


def _read(url: str, most: int) -> bytes:
    import httpx

    until = time.monotonic() + _SECONDS
    try:
        context = httpx.create_ssl_context()  # SSL_CERT_FILE's authorities, where it is set
        client = httpx.Client(verify=context, trust_env=False, follow_redirects=False, timeout=_PATIENCE)
        with client, _closed_after(client, _SECONDS):  # headers may drip, each byte within our patience
            for _ in range(_MOST_REDIRECTS + 1):
                place = httpx.URL(url)
                with client.stream("GET", **_pinned(place)) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise _Refused(f"{place.host} answers {response.status_code}")
                    return _content(response, most)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError, RuntimeError) as error:
        if time.monotonic() >= until:
            raise _Refused(f"it was not there after {_SECONDS:.0f} seconds") from error
        raise _Refused(" ".join(str(error).split())[:200] or type(error).__name__) from error
    raise _Refused(f"more than {_MOST_REDIRECTS} redirects")


@contextmanager
def _closed_after(client: Any, seconds: float) -> Generator[None]:
    """The client is closed while it is used, should the block take so long; what it reads then fails."""
    timer = threading.Timer(seconds, client.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _pinned(place: Any) -> dict[str, Any]:
    """A request that goes to the very address that was looked at, under the name of its host."""
    if place.scheme not in ("http", "https") or not place.host:
        raise _Refused(f"only http and https are fetched, not {place.scheme[:20]!r}")
    port = place.port or {"http": 80, "https": 443}[place.scheme]
    address = public_address(place.host, port)
    host = place.netloc.decode("ascii").rpartition("@")[2]
    return {
        "url": place.copy_with(host=address),
        "headers": {"Host": host, "Accept-Encoding": "identity", "User-Agent": "lowrank"},
        "extensions": {"sni_hostname": place.raw_host.decode("ascii").strip("[]")},
    }


def public_address(host: str, port: int) -> str:
    """An address of a host. _Refused where one of its addresses is not of the public internet."""
    found = [each[4][0] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    private = next((each for each in found if not _is_public(str(each))), None)
    if private is not None or not found:
        raise _Refused(f"{host} is at {private}, which is no public address")
    return str(found[0])


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour or (address.teredo or (None,))[0]
        if within is not None or address in _NAT64 or address.is_site_local:
            return False  # other addresses in disguise
    return address.is_global and not address.is_multicast


def _content(response: Any, most: int) -> bytes:
    data = bytearray()
    for part in response.iter_raw():
        data += part
        if len(data) > most:
            raise _Refused(f"it has more than {most / 1e6:.0f} MB")
    return bytes(data)
