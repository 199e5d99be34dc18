"""What a machine without network lacks, as wheels: `python -m benchmarks.gpu_day.wheels --have NAMES --out DIR`.

`--have`: a file with a package a line (`pip list --format=freeze` there; versions are not read). Needed are the
packages that lowrank and its benchmarks import, and what those need, as far as they are not there. torch is never
among them: a machine with a GPU has its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

WANTED = ("transformers", "datasets", "pydantic", "pyyaml", "typer", "rich", "regex", "psutil", "filelock", "jinja2")
WANTED += (
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "matplotlib",
    "trl",
    "peft",
    "pytest",
    "pytest-timeout",
)
LIGHT_PEERS = ("liger-kernel",)
"""Not installed where there is no GPU; they need nothing but torch and triton."""
NEVER = {"torch", "triton", "numpy"}
LIMIT = 60 << 20


def main() -> None:
    """Download, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".whl"))
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    options = parser.parse_args()
    have = {name_of(line) for line in options.have.read_text().splitlines() if line.strip()} | NEVER
    missing = sorted(needed({name_of(name) for name in WANTED}, have, options.python))
    print("missing there:", " ".join([*missing, *LIGHT_PEERS]))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        download(f"{name}=={importlib.metadata.version(name)}", options.out, options.python)
    for name in LIGHT_PEERS:
        if name not in have:
            download(name, options.out, options.python)
    size = sum(path.stat().st_size for path in options.out.glob("*.whl"))
    print(f"{size / 2**20:.1f} MiB in {options.out}")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT >> 20} MiB: leave some out")


def name_of(line: str) -> str:
    """The package of a line, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~;\[@ ]", line.strip(), maxsplit=1)[0]).lower()


def needed(names: set[str], have: set[str], python: str) -> set[str]:
    """Those of `names` and of what they need that are not there; by what is installed here."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing: set[str] = set()
    waiting = sorted(names - have)
    while waiting:
        name = waiting.pop()
        missing.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            own = name_of(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate(environment)
            if applies and own not in missing and own not in have:
                waiting.append(own)
    return missing


def download(what: str, folder: Path, python: str) -> None:
    """One wheel for Linux on x86-64."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 5)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
    ]
    command += ["--implementation", "cp", "-d", str(folder), what]
    for platform in [*platforms, "manylinux2014_x86_64", "manylinux1_x86_64"]:
        command += ["--platform", platform]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
