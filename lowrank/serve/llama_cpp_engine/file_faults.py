"""What is wrong with a GGUF file, in words: llama.cpp says no more than that its server did not start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.errors import ModelError
from lowrank.export.gguf.header import Header, read_header

_MAGIC = b"GGUF"
_TOWER = "clip"
_KNOWN = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull, or the hub's download)",
    b"<html": "a web page, and no model; the download went wrong",
    b"<!doctype": "a web page, and no model; the download went wrong",
    b"PK\x03\x04": "a zip archive, and no GGUF file",
    b"{": "JSON, and no GGUF file",
}


def check_files(path: Path, adapters: Sequence[Path]) -> None:
    """ModelError that names the file and what is wrong with it."""
    base = _checked(path)
    headers = [_checked(adapter) for adapter in adapters]
    kind = base.fields.get("general.type", "model")
    if kind == "adapter":
        raise ModelError(
            f"{path}: this is an adapter, not a model; give the model's file, and this one's folder as --adapters"
        )
    architecture = base.fields.get("general.architecture")
    if kind == "mmproj" or architecture == _TOWER:
        raise ModelError(
            f"{path}: this is a tower's file, for llama.cpp's --mmproj; give the language model's beside it, which is "
            "read as text here (pictures: serve the model's folder, or run llama-server with --mmproj)"
        )
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: its header names no architecture (general.architecture), so nobody can run it")
    if architecture not in _architectures():
        raise ModelError(f"{path}: llama.cpp knows no architecture {architecture[:60]!r}")
    if not base.tensors:
        raise ModelError(f"{path}: it has no tensors (a file of a tokenizer only?)")
    for adapter, header in zip(adapters, headers):
        _check_adapter(adapter, header, base, architecture)


def _check_adapter(path: Path, header: Header, base: Header, architecture: str) -> None:
    if header.fields.get("general.type") != "adapter" or header.fields.get("adapter.type") != "lora":
        raise ModelError(f"{path}: this is no LoRA adapter (general.type, adapter.type); --adapters takes those only")
    if header.fields.get("general.architecture") != architecture:
        other = header.fields.get("general.architecture")
        raise ModelError(f"{path}: an adapter for {other!r}, and {base.path.name} is {architecture!r}")
    if base.fields.get("split.count", 1) > 1:  # the other parts have tensors too
        return
    for name in header.tensors:
        target = name.removesuffix(".lora_a").removesuffix(".lora_b")
        if target not in base.tensors:
            raise ModelError(f"{path}: it adapts {target[:80]!r}, which {base.path.name} does not have: another base's")


def _checked(path: Path) -> Header:
    """Its header, where as many bytes are behind it as that says."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not begin.startswith(_MAGIC):
        what = next(
            (described for sign, described in _KNOWN.items() if begin.lower().lstrip().startswith(sign.lower())), None
        )
        what = what or ("an empty file" if not size else f"no GGUF file: it begins with {begin[:4]!r}")
        raise ModelError(f"{path}: {what}")
    header = read_header(path)
    end = max((stored.start + stored.entry.bytes for stored in header.tensors.values()), default=0)
    if end > size:
        raise ModelError(f"{path}: it was cut off: {size} bytes, and its header describes {end}; fetch it again")
    return header


def _architectures() -> set[str]:
    from gguf import MODEL_ARCH_NAMES  # optional third-party package

    return set(MODEL_ARCH_NAMES.values())
