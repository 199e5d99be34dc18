"""Has our child processes end with us, also where we are killed and can do nothing about it any more.

vLLM's engine runs in processes of its own that notice nothing when the server is killed (-9) and keep the model in
memory. So a small process waits at the end of a pipe whose other end is ours: it is closed when we end, however that
happens. (PR_SET_PDEATHSIG would have to be set by the child itself, which is vLLM's.)

    python -m lowrank.serve.vllm_engine.child_watch PID:SECONDS ...     seconds since 1970 at which each began
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

import psutil


def child_ids() -> frozenset[int]:
    """Our processes' ids now: of those that are none of the engine's to come."""
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))


def watch_children(others: Collection[int] = ()) -> subprocess.Popen[bytes] | None:
    """Start the watch over all that we started so far, but for `others`; None if there is nothing to watch.

    Keep what is returned: closing its `stdin` ends the children that are left.
    """
    children = [child for child in psutil.Process().children(recursive=True) if child.pid not in others]
    if not children:
        return None
    named = [f"{child.pid}:{child.create_time()!r}" for child in children]
    arguments = [sys.executable, "-m", "lowrank.serve.vllm_engine.child_watch", *named]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, start_new_session=True)


def _main() -> None:
    while sys.stdin.buffer.read(1024):  # nothing is ever written: this waits for the end
        continue
    for argument in sys.argv[1:]:
        pid, _, began = argument.partition(":")
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(began):  # numbers are given again
                process.kill()
        except psutil.Error:
            continue


if __name__ == "__main__":
    _main()
