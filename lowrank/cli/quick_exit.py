"""The end of a process that has only looked at something.

The interpreter ends by looking through every object and freeing each: 0.3 processor seconds where torch is imported,
0.8 after a plan. The system frees them at once.
"""

from __future__ import annotations

import atexit
import os
import sys


class QuickExit:
    """Made before the libraries are imported, it ends the process last: what they have registered for the end has run.

    Without a `code` the interpreter ends as always, as after an error that nobody caught.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._exit)

    def _exit(self) -> None:
        if self.code is None:
            return
        sys.stdout.flush()  # where nobody reads, this raises and the interpreter says so
        sys.stderr.flush()
        os._exit(self.code)
