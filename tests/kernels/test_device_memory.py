"""Segments that grow, where there is an NVIDIA driver and nobody has said otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.kernels.device_memory import use_expandable_segments


def test_only_beside_nvidias_driver(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    assert not use_expandable_segments(environment, tmp_path / "nvidiactl")
    assert not environment
    (tmp_path / "nvidiactl").touch()
    assert use_expandable_segments(environment, tmp_path / "nvidiactl")
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_a_person_has_set_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    environment = {name: "max_split_size_mb:64"}
    assert not use_expandable_segments(environment, tmp_path / "nvidiactl")
    assert environment == {name: "max_split_size_mb:64"}


@pytest.mark.slow
def test_torch_reads_it_though_it_is_imported(tmp_path: Path) -> None:
    """The environment is read when memory is first asked for; and commands that load weights do it."""
    code = """
import os, sys, torch
from pathlib import Path
from lowrank.kernels import device_memory
device_memory.use_expandable_segments.__defaults__ = (os.environ, Path(sys.argv[1]))
from lowrank.cli.main import main
try:
    main(["chat", "/nowhere"])
except SystemExit:
    pass
print(torch._C._accelerator_getAllocatorSettings())
"""
    driver = tmp_path / "nvidiactl"
    driver.touch()
    done = subprocess.run([sys.executable, "-c", code, str(driver)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "expandable_segments:True"
