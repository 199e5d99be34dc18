"""Whoever is killed takes its children along."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

PROGRAM = """
import subprocess, sys, time
from lowrank.serve.vllm_engine.child_watch import child_ids, watch_children
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
others = child_ids()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
watch = watch_children(others)
print(child.pid, other.pid, flush=True)
time.sleep(60)
"""


def test_children_end_with_their_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child, other = (psutil.Process(int(number)) for number in parent.stdout.readline().split())
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            assert other.is_running()  # it was there before, and is none of the engine's
            other.kill()
            return
        time.sleep(0.05)
    child.kill()
    other.kill()
    pytest.fail("it outlived its parent")
