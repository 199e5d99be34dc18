"""llama.cpp's own converter, for the families that lowrank does not know.

It is Python that llama.cpp ships in its source, which PyPI has as a part of llama-cpp-python's. Only the converter is
taken out of it, nothing is compiled, and it runs in a process of its own with the `gguf` package that belongs to it,
on the torch and transformers that are here. What it writes counts once it is compared (export/verify/compare.py): it
checks little.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lowrank.checkpoints.atomic import new_folder
from lowrank.errors import ModelError
from lowrank.export import Install
from lowrank.export.gguf.llama_cpp import child_environment, stderr_tail
from lowrank.kernels.cache_folder import cache_folder

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SENTENCEPIECE = "0.2.3"
"""What the converter reads tokenizers like Llama 2's with."""
SCRIPT = "convert_hf_to_gguf.py"
_PACKAGES = "packages"
_SUPPORTED, _TOWERS = "supported.txt", "towers.txt"
_HEADING = "MMPROJ models:"
"""Of the second of the lists that the converter prints."""
_WANTED = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
TYPES = ("f32", "f16", "bf16", "q8_0")
_SHORT_NAMES = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Towers, by transformers' `model_type`, of which transformers 5 saves tensors without `vision_model.`."""
_SHORT_NAME = re.compile(r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|post_layernorm|pre_layrnorm|head)\.)")
_ON_THE_HUB = r"\g<1>vision_model."


def names_for(vision: str | None) -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to what the converter calls it, as on the hub. `vision`: Model.vision."""
    return partial(_SHORT_NAME.sub, _ON_THE_HUB) if vision in _SHORT_NAMES else str


class Upstream:
    """The converter in `folder` (a clone of llama.cpp), or the one that is fetched from PyPI."""

    def __init__(self, folder: Path | None = None) -> None:
        self.given = folder
        self.folder = folder or cache_folder() / f"llama.cpp-converter-{VERSION}"

    @property
    def name(self) -> str:
        """For people."""
        where = "PyPI's llama-cpp-python " + VERSION if self.given is None else str(self.given)
        return f"llama.cpp's own converter ({where})"

    @property
    def is_here(self) -> bool:
        """Whether nothing is to be fetched."""
        return (self.folder / SCRIPT).is_file()

    def installs(self, architecture: str) -> tuple[Install, ...]:
        """What is to be fetched; ModelError for what is there already and does not know `architecture`."""
        if self.is_here:
            self.check(architecture)
            return ()

        def make() -> None:
            self.fetch()
            self.check(architecture)

        return (Install(self.announcement(f"lowrank's converter does not know {architecture}"), make),)

    def announcement(self, why: str) -> str:
        """What is fetched, and why. ModelError where the folder that was named has no converter."""
        if self.given is not None:
            raise ModelError(f"converter: {self.given} has no {SCRIPT}; name the folder of llama.cpp's source")
        return (
            f"{why}; fetching llama.cpp's own: llama-cpp-python {VERSION} "
            f"from PyPI (source, 77 MB, of which 5 MB of Python are kept) and sentencepiece (2 MB) into "
            f"{self.folder}; nothing is compiled, and nothing is added to this environment"
        )

    def fetch(self) -> None:
        """Where it is not here yet. ModelError if it cannot be had."""
        if not self.is_here:
            fetch(self.folder)

    def check(self, architecture: str) -> None:
        """Raises ModelError if the converter does not know this class of transformers, or does not run here."""
        if architecture not in self._listed(_SUPPORTED):
            raise ModelError(
                f"neither lowrank nor {self.name} can write {architecture} to GGUF; serve it from its merged "
                "checkpoint (--to merged)"
            )

    def knows_tower(self, architecture: str) -> bool:
        """Whether it knows the towers of this class of transformers. Raises ModelError if it does not run here."""
        return architecture in self._listed(_TOWERS)

    def _listed(self, file: str) -> list[str]:
        listed = self.folder / file
        names = listed.read_text(encoding="utf-8") if listed.is_file() else supported(self.folder)[file == _TOWERS]
        return names.split()

    def convert(self, model: Path, path: Path, kind: str, name: str, *, tower: bool = False) -> None:
        """Write the checkpoint in `model` to `path`, or its `tower` alone; it will be called `name`. Raises ModelError
        with the end of what the converter said."""
        arguments = [str(model), "--outfile", str(path), "--outtype", kind, "--model-name", name]
        arguments += ["--mmproj"] if tower else []
        run(self.folder, arguments, f"{self.name} on {name}")


def fetch(folder: Path) -> None:
    """The converter into `folder`. Raises ModelError if it cannot be had."""
    with tempfile.TemporaryDirectory() as scratch, new_folder(folder) as partial:
        archive = _download(Path(scratch))
        _pip(
            "install", "--target", str(partial / _PACKAGES), "--only-binary", ":all:", f"sentencepiece=={SENTENCEPIECE}"
        )
        root = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(root)
                if member.isfile() and name != member.name and name.startswith(_WANTED):
                    member.name = name
                    tar.extract(member, partial, filter="data")
        for file, names in zip((_SUPPORTED, _TOWERS), supported(partial), strict=True):
            (partial / file).write_text(names, encoding="utf-8")


def _download(folder: Path) -> Path:
    """The source archive, its hash checked by pip."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    _pip("download", "--no-binary", "llama-cpp-python", "--require-hashes", "--dest", str(folder), "-r", str(wanted))
    return folder / f"llama_cpp_python-{VERSION}.tar.gz"


def _pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--no-deps", "--retries", "1", "--timeout", "20", "--disable-pip-version-check"]
    whole = [sys.executable, "-m", "pip", command, *options, *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise ModelError(
            stderr_tail("fetching llama.cpp's converter from PyPI", done.returncode, done.stderr)
            + "\n  without a network: get llama.cpp's source elsewhere and name its folder (gguf.converter=FOLDER, or "
            "ollama.converter=FOLDER), or serve the model from its merged checkpoint (--to merged)"
        )


def supported(folder: Path) -> tuple[str, str]:
    """Classes of transformers that the converter in `folder` knows, separated by blanks: of language models, and of
    what stands before them."""
    texts, _, towers = run(folder, ["--print-supported-models"], "llama.cpp's converter").partition(_HEADING)
    return _names(texts), _names(towers)


def _names(printed: str) -> str:
    return " ".join(line.strip("- ") for line in printed.splitlines() if line.strip().startswith("- "))


def run(folder: Path, arguments: list[str], what: str) -> str:
    """What the converter says. It finds its own `gguf` first. Raises ModelError."""
    environment = child_environment()
    own = [str(folder / "gguf-py"), str(folder / _PACKAGES)]
    environment["PYTHONPATH"] = os.pathsep.join([*own, environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(folder / SCRIPT), *arguments],
        env=environment, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise ModelError(stderr_tail(what, done.returncode, done.stderr))
    return done.stdout + done.stderr
