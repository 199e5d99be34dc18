"""Where what a person should know goes in library calls that name no listener: the logger `lowrank`.

Python shows warnings on standard error where nobody has set logging up, so nothing is lost;
`logging.getLogger("lowrank")` is how it is turned down, or sent elsewhere. The command line passes listeners of its
own.
"""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("lowrank")


def log_notice(text: str) -> None:
    """The default of every `notify`."""
    LOGGER.warning("%s", text)
