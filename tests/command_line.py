"""`lowrank ...` as a process of its own, without the seconds that each would take to import torch and transformers.

One process has imported them and forks a child for each command. tests/cli/test_main.py starts the real program.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

_FORKS = """
import gc, os, sys, traceback
import datasets, matplotlib.pyplot, transformers.models.llama.modeling_llama
import lowrank.cli.train, lowrank.cli.warm, lowrank.pipelines.train
from lowrank.cli.main import main
from lowrank.pipelines import memory_plan
from tests.plans import PLANS, once_for_each_kind
from tests.plots import draw_if_requested

memory_plan._plan = once_for_each_kind(os.environ[PLANS])

def handle(request):
    if request["session"]:
        os.setsid()
    for number, name in enumerate(("stdin", "out", "err")):
        opened = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)
    encoding = request["env"].get("PYTHONIOENCODING")
    if encoding:  # as the interpreter does when it starts
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    if request["env"].get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    if request["umask"] is not None:
        os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    draw_if_requested()
    sys.path.remove("")  # the real program has its own folder there, not the current one
    sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["lowrank", *request["arguments"]]
    try:
        if request["arguments"] == ["warm"]:  # the child of a board (cli/warm.py)
            lowrank.cli.warm.serve()
        main(request["arguments"])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take the interpreter down would copy every page of it

gc.freeze()
lowrank.cli.warm.serve_requests(handle)
os._exit(0)
"""
_NUMBERS = itertools.count(1)


class Child:
    """A command that runs, with what tests need of `subprocess.Popen`."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.began, self.ended = threading.Event(), threading.Event()

    def poll(self) -> int | None:
        """Its exit code, once it is over."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it is over."""
        if not self.ended.wait(timeout):
            raise TimeoutExpired("lowrank", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """At once."""
        if self.returncode is None:
            os.kill(self.pid, 9)


class _Forks:
    """The process that has imported everything."""

    def __init__(self) -> None:
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _FORKS]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="forks", daemon=True)
        self._listener.start()
        atexit.register(self._close)

    def start(self, request: dict[str, Any]) -> Child:
        child, number = Child(), next(_NUMBERS)
        with self._lock:
            assert self.process.stdin is not None
            self._children[number] = child
            self.process.stdin.write(json.dumps({"id": number, **request}) + "\n")
            self.process.stdin.flush()
        child.began.wait()
        assert child.pid, "the process that forks has died"
        return child

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            news = json.loads(line)
            child = self._children[news["id"]]
            child.pid = news.get("pid", child.pid)
            child.began.set()
            if "code" in news:
                child.returncode = news["code"]
                child.ended.set()
        for child in self._children.values():
            child.began.set()

    def _close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # it ends as its input does
        self.process.wait()
        self._listener.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@cache
def _forks() -> _Forks:
    return _Forks()


def start(
    arguments: Sequence[str],
    *,
    out: Path,
    err: Path,
    cwd: Path | None = None,
    umask: int | None = None,
    environment: Mapping[str, str] | None = None,
    session: bool = False,
    stdin: str = os.devnull,
) -> Child:
    """Begin the command line with these arguments; what it prints is added to files.

    `environment`: all of it; `session`: no Ctrl-C of ours reaches it.
    """
    request = {
        "arguments": list(arguments), "cwd": str(cwd or Path.cwd()), "umask": umask, "out": str(out), "err": str(err),
        "env": dict(environment or {**os.environ, "OMP_NUM_THREADS": "1"}), "session": session,
        "stdin": stdin,
    }  # fmt: skip
    return _forks().start(request)


def running() -> int | None:
    """The id of the process that forks, once there is one."""
    return _forks().process.pid if _forks.cache_info().currsize else None


def lowrank(
    *arguments: str, cwd: Path | None = None, umask: int | None = None, **environment: str
) -> CompletedProcess[str]:
    """Run the command line with these arguments; its exit code and what it printed."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = start(arguments, out=out, err=err, cwd=cwd, umask=umask, environment=own).wait()
        encoding = own.get("PYTHONIOENCODING", "utf-8")
        printed = (file.read_text(encoding, errors="replace") for file in (out, err))  # click writes UTF-8 all the same
        return CompletedProcess(["lowrank", *arguments], code, *printed)
