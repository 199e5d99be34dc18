"""The process that answers the browser is light: nothing heavy is imported, and it stays under 100 MB."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

import lowrank.board
from tests.board.running import start_program

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "pandas",
    "lowrank.config",
    "lowrank.pipelines.train",
    "lowrank.models.config",
)


def test_nothing_heavy_is_imported() -> None:
    code = "import json, sys, lowrank.board.serve, lowrank.cli.board; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.PIPE)
    imported = set(json.loads(done.stdout))
    assert "lowrank.board.serve" in imported
    assert imported.isdisjoint(HEAVY), imported.intersection(HEAVY)


def test_it_stays_small_while_pages_are_read(tmp_path: Path) -> None:
    program = start_program(tmp_path)
    try:
        with httpx.Client(trust_env=False, timeout=30) as http:
            http.get(program.address)
            base = program.address.partition("/?")[0]
            for _ in range(5):
                for path in ("/", "/new", "/data", "/compare", "/api/fields", "/static/vendor/uPlot.js"):
                    assert http.get(base + path).status_code == 200
        assert psutil.Process(program.process.pid).memory_info().rss < 100e6
    finally:
        program.kill()


def test_files_of_others_are_as_they_were_published() -> None:
    """axe-core 4.14.1 and uPlot 1.6.32 of the npm registry: changed, the first would find nothing."""
    shipped = Path(lowrank.board.__file__).parent / "static" / "vendor"
    for path, digest in (
        (
            Path(__file__).parent / "vendor" / "axe.min.js",
            "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c",
        ),
        (shipped / "uPlot.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
        (shipped / "uPlot.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
    ):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, path.name
