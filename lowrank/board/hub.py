"""What a model of the Hugging Face hub is, before anything of it is fetched: from the cache, else from the hub's API.

Only when a person has typed its name; the pages themselves ask nobody. The process stays light: huggingface_hub is not
imported.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from lowrank.board.models import described
from lowrank.hub_names import is_hub_name

_SECONDS = 8.0
_LARGEST = 8 << 20


def about_hub_model(name: str) -> dict[str, Any]:
    """`kind`, `bytes` of its weights, `chat` (whether it has a chat template) and `where` (cache or hub); `problem`
    with why nothing is known."""
    assert is_hub_name(name), name
    cached = in_cache(name)
    if cached is not None:
        return {**cached, "where": "cache"}
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {"problem": "offline"}
    try:
        return {**_read(_fetch(name)), "where": "hub"}
    except urllib.error.HTTPError as error:
        return {"problem": {401: "unknown", 403: "closed", 404: "unknown"}.get(error.code, "unreachable")}
    except (OSError, HTTPException, ValueError, AttributeError, TypeError, KeyError):
        return {"problem": "unreachable"}


def in_cache(name: str) -> dict[str, Any] | None:
    """What lies in the cache of the hub's own library, if the weights are there."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return described(folder / "snapshots" / commit) if re.fullmatch(r"[0-9a-f]{4,64}", commit) else None


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A renamed model is elsewhere at the hub; the person's key goes to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(name: str) -> Any:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if urlsplit(endpoint).scheme not in ("https", "http"):
        raise ValueError(endpoint)
    request = urllib.request.Request(f"{endpoint}/api/models/{quote(name)}?blobs=true")
    if os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    with urllib.request.build_opener(_SameHost).open(request, timeout=_SECONDS) as answer:
        return json.loads(answer.read(_LARGEST))


def _read(reply: dict[str, Any]) -> dict[str, Any]:
    """The hub's answer; a model has its weights in several forms, of which safetensors are read."""
    config = reply.get("config") or {}
    sizes = {str(file["rfilename"]): int(file.get("size") or 0) for file in reply.get("siblings") or ()}
    safe = sum(size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name)
    if not isinstance(config.get("model_type"), str) or not safe:
        return {"problem": "no_model"}
    tokenizer = config.get("tokenizer_config") or {}
    chat = bool(tokenizer.get("chat_template") or config.get("chat_template_jinja") or "chat_template.jinja" in sizes)
    return {"kind": config["model_type"][:60], "bytes": safe, "chat": chat}
