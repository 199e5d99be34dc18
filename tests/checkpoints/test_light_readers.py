"""Whoever only looks at a run folder, as a web page does, imports no torch; the schema is a file that is current."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lowrank.config.schema_file import FILE, schema_text

READERS = [
    "lowrank.checkpoints.run_folder",
    "lowrank.checkpoints.steps",
    "lowrank.report.reporters.metrics",
    "lowrank.report.event_lines",
    "lowrank.report.summary",
    "lowrank.report.progress",
    "lowrank.report.page",
    "lowrank.cli.report",
    "lowrank.third_party",
]


@pytest.mark.parametrize("module", [" ".join(READERS)])
def test_readers_of_a_run_import_no_torch(module: str) -> None:
    code = (
        f"import sys, importlib\nfor name in {module.split()!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import psutil\nprint(psutil.Process().memory_info().rss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 100e6


def test_the_schema_is_a_file_that_is_current() -> None:
    """Else: python -m lowrank.config.schema_file"""
    assert FILE.read_text("utf-8") == schema_text()
    assert "output_dir" in json.loads(schema_text())["properties"]


def test_the_schema_is_printed_without_torch() -> None:
    code = (
        "import sys\nfrom lowrank.cli.main import main\n"
        "try: main(['show', '--schema'])\nexcept SystemExit as left: assert not left.code, left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == json.loads(FILE.read_text("utf-8"))


def test_conftest_leaves_transformers_to_its_plugins() -> None:
    """A torchvision made for another torch keeps transformers from being imported; one of them mends that first."""
    code = "import sys, tests.conftest\nassert 'transformers' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
