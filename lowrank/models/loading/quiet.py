"""transformers' progress bars, load reports and advice are not for our users; its errors are."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from transformers.utils import logging


@contextlib.contextmanager
def quiet_transformers() -> Generator[None, None, None]:
    """Silence transformers below the level of errors, and its progress bars."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
