"""A process that has imported what commands need, and forks one for each request: no request waits for a start.

It is no command of its own but a child of the board (`python -m lowrank.cli.warm`). Requests come as lines of JSON on
standard input, `{"id": 1, "arguments": ["plan", "run.yaml", "--json"], "out": FILE, "err": FILE}`; on standard output
it says `{"id": 1, "pid": 4711}` and, when that is over, `{"id": 1, "code": 0}`. It ends with its input. What imports a
device's library starts it in the fork alone, so this process holds no memory of a GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any

HEAVY = (
    "datasets",
    "transformers",
    "lowrank.compat",
    "lowrank.cli.data",
    "lowrank.cli.plan",
    "lowrank.cli.show",
    "lowrank.planning.choose",
)
_LONGEST_SECONDS = 600
_MOST_BYTES = 64 << 20


def serve() -> None:
    """Serve requests until standard input ends."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
    _send({"ready": True})
    serve_requests(_handle)


def serve_requests(handle: Callable[[dict[str, Any]], None]) -> None:
    """Until standard input ends, fork a child for each line, where `handle` is called and never returns."""
    running: dict[int, int] = {}
    rest = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02 if running else None)
        if readable:
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                child = os.fork()
                if not child:
                    handle(request)
                running[child] = request["id"]
                _send({"id": request["id"], "pid": child})
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                _send({"id": running.pop(child), "code": os.waitstatus_to_exitcode(status)})


def _handle(request: dict[str, Any]) -> None:
    """In the fork: the command, its output in files. Never returns."""
    from lowrank.cli.main import main

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        _limit()
        sys.argv = ["lowrank", *request["arguments"]]
        main(request["arguments"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit() -> None:
    """Settings and data come from anywhere: no request may take for ever, or fill the disk with its answer."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_LONGEST_SECONDS, _LONGEST_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, _MOST_BYTES))


def _send(line: dict[str, Any]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    serve()
