"""An exported folder with a Modelfile, made a model of a running Ollama server, over its HTTP API.

HEAD and POST /api/blobs/sha256:... for each file, POST /api/create, then one answer from POST /api/chat.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowrank.errors import ConfigError, ModelError, OutputError
from lowrank.export.publish.modelfile import Modelfile, parse
from lowrank.notices import log_notice

QUANTIZED_BY_OLLAMA = ("q8_0", "q4_K_M", "q4_K_S")
"""What `quantize` of /api/create takes; the file must then be f16, bf16 or f32."""
_PORT = 11434
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A file that the server needs."""

    path: Path
    digest: str
    """`sha256:` and 64 hexadecimal digits."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Deployment:
    """What will be asked of the server."""

    name: str
    modelfile: Modelfile
    model: Blob | None
    """None: FROM names a model that the server has."""
    adapter: Blob | None
    quantize: str | None = None
    projector: Blob | None = None

    @property
    def blobs(self) -> list[Blob]:
        """All files, in the order in which they are uploaded."""
        return [blob for blob in (self.model, self.projector, self.adapter) if blob is not None]

    def request(self) -> dict[str, Any]:
        """The body of POST /api/create, as the client's `create` takes it."""
        own = self.modelfile
        files = {blob.path.name: blob.digest for blob in (self.model, self.projector) if blob is not None}
        fields = {
            "from_": own.model if self.model is None else None,
            "files": files or None,
            "adapters": {self.adapter.path.name: self.adapter.digest} if self.adapter else None,
            "template": own.template,
            "system": own.system,
            "license": own.license,
            "parameters": own.request_parameters() or None,
            "quantize": self.quantize,
        }
        return {"model": self.name, **{key: value for key, value in fields.items() if value is not None}}


def plan(name: str, folder: Path, *, quantize: str | None = None) -> Deployment:
    """Read the Modelfile in `folder` and the files it names. Raises ModelError, ConfigError."""
    file = folder / "Modelfile"
    if not file.is_file():
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        place = folder if free else "ANOTHER_FOLDER"
        raise ModelError(f"{folder}: no Modelfile in it; make one first: lowrank export RUN --to ollama -o {place}")
    if quantize is not None and quantize not in QUANTIZED_BY_OLLAMA:
        raise ConfigError(
            f"--quantize {quantize}: Ollama makes {', '.join(QUANTIZED_BY_OLLAMA)}; export any other type with "
            "lowrank export --to ollama --type ..."
        )
    modelfile = parse(file.read_text(encoding="utf-8"))
    model = folder / modelfile.model
    named = modelfile.model.startswith((".", "/", "~")) or modelfile.model.endswith(".gguf")
    if named and not model.is_file():
        raise ModelError(f"{file}: FROM {modelfile.model}: there is no such file")
    if modelfile.projector is not None and not (folder / modelfile.projector).is_file():
        raise ModelError(f"{file}: FROM {modelfile.projector}: there is no such file")
    if modelfile.projector is not None and not model.is_file():
        raise ModelError(
            f"{file}: FROM {modelfile.model} is no file, and a second FROM goes with files alone; use ollama create"
        )
    if modelfile.projector is not None and model.name == (folder / modelfile.projector).name:
        raise ModelError(f"{file}: both files of FROM are called {model.name}, which an upload cannot tell apart")
    if modelfile.adapter is not None and not (folder / modelfile.adapter).is_file():
        raise ModelError(f"{file}: ADAPTER {modelfile.adapter}: there is no such file")
    if quantize is not None and not model.is_file():
        raise ConfigError(f"--quantize {quantize}: FROM {modelfile.model} is no file, so nothing is quantized")
    return Deployment(
        name,
        modelfile,
        _blob(model) if model.is_file() else None,
        _blob(folder / modelfile.adapter) if modelfile.adapter is not None else None,
        quantize,
        _blob(folder / modelfile.projector) if modelfile.projector is not None else None,
    )


def server_url(host: str | None) -> str:
    """`host` (a name, with or without scheme and port), else OLLAMA_HOST, else this machine."""
    fields = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1"
    parts = urlsplit(fields if "://" in fields else f"http://{fields}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else _PORT)
    except ValueError as error:
        raise ConfigError(f"the address of the Ollama server is {fields!r}, expected host:port") from error
    name = "127.0.0.1" if parts.hostname in (None, "0.0.0.0") else parts.hostname
    return f"{parts.scheme}://{f'[{name}]' if ':' in str(name) else name}:{port}"


def deploy(
    wanted: Deployment, url: str, prompt: str | None, notify: Callable[[str], None] = log_notice
) -> dict[str, Any]:
    """Upload what the server lacks, create the model, ask it `prompt`; what happened, for --json.

    Raises ModelError without the client package, OutputError where the server cannot be reached or refuses.
    """
    if find_spec("ollama") is None:
        raise ModelError("Ollama's client is not installed: pip install 'lowrank-llm[ollama]'")
    import ollama

    client = ollama.Client(host=url)
    with _refusals(url):
        uploaded = []
        for blob in wanted.blobs:
            if _has(url, blob):
                notify(f"{blob.path.name}: the server has it")
                continue
            notify(f"{blob.path.name}: uploading {blob.size / 1e6:,.1f} MB")
            client.create_blob(blob.path)
            uploaded.append(blob.path.name)
        for status in client.create(**wanted.request(), stream=True):
            if status.status and not status.status.startswith("using existing layer"):
                notify(status.status)
        deployment: dict[str, Any] = {"model": wanted.name, "server": url, "uploaded": uploaded, "answer": None}
        if prompt:
            answer = client.chat(wanted.name, [{"role": "user", "content": prompt}], options={"num_predict": 128})
            deployment["answer"] = answer.message.content
    return deployment


def _has(url: str, blob: Blob) -> bool:
    """HEAD /api/blobs/DIGEST, which the client package lacks."""
    import httpx

    response = httpx.head(f"{url}/api/blobs/{blob.digest}", timeout=60)
    if response.status_code not in (200, 404):
        raise OutputError(f"{url}: /api/blobs answers {response.status_code}; is this an Ollama server?")
    return response.status_code == 200


@contextmanager
def _refusals(url: str) -> Generator[None, None, None]:
    """The client's errors in our words."""
    import httpx
    import ollama

    try:
        yield
    except ollama.ResponseError as error:
        raise OutputError(f"{url}: the Ollama server refuses: {error.error}") from error
    except (ConnectionError, httpx.HTTPError) as error:
        raise OutputError(
            f"{url}: no Ollama server answers there ({error}); start it (ollama serve), or give --host"
        ) from error


def _blob(path: Path) -> Blob:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return Blob(path, f"sha256:{digest.hexdigest()}")
