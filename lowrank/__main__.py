"""The command line as a process of its own: `lowrank`, and `python -m lowrank`."""

from __future__ import annotations

import sys

from lowrank.cli.main import ONLY_LOOKS, main
from lowrank.cli.quick_exit import QuickExit


def run() -> None:
    """Run the command that `sys.argv` names, and exit with its code."""
    quick_exit = QuickExit() if set(sys.argv[1:2]) & ONLY_LOOKS else None
    try:
        main()
    except SystemExit as end:
        if quick_exit is not None and isinstance(end.code, int):
            quick_exit.code = end.code
        raise


if __name__ == "__main__":
    run()
