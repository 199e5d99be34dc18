"""`lowrank ...` as a process of its own, without the seconds that each would take to import torch and transformers.

One process has imported them and forks a child for each command. tests/cli/test_main.py starts the real program.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

_FORKS = """
import gc, json, os, sys, traceback
import datasets, matplotlib.pyplot, transformers.models.llama.modeling_llama
import lowrank.cli.train, lowrank.pipelines.train
from lowrank.cli.main import main

gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
        sys.stdin = open(0, closefd=False)
        encoding = order["env"].get("PYTHONIOENCODING")
        if encoding:  # as the interpreter does when it starts
            sys.stdout.reconfigure(encoding=encoding)
            sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
        if order["umask"] is not None:
            os.umask(order["umask"])
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        sys.path.remove("")  # the real program has its own folder there, not the current one
        sys.path[:0] = filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.argv = ["lowrank", *order["arguments"]]
        try:
            main(order["arguments"])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to take the interpreter down would copy every page of it
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _forks() -> subprocess.Popen[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FORKS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
    atexit.register(process.communicate)  # it ends as its input does
    return process


def running() -> int | None:
    """The id of the process that forks, once there is one."""
    return _forks().pid if _forks.cache_info().currsize else None


def lowrank(
    *arguments: str, cwd: Path | None = None, umask: int | None = None, **environment: str
) -> CompletedProcess[str]:
    """Run the command line with these words; its exit code and what it printed. Its standard input is empty."""
    process = _forks()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        order = {
            "arguments": arguments, "cwd": str(cwd or Path.cwd()), "umask": umask, "out": str(out), "err": str(err),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        }  # fmt: skip
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        encoding = order["env"].get("PYTHONIOENCODING", "utf-8")
        printed = (file.read_text(encoding, errors="replace") for file in (out, err))  # click writes UTF-8 all the same
        return CompletedProcess(["lowrank", *arguments], code, *printed)
