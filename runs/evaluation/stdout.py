"""Keep stdout for the result: what an engine, its threads and its child processes print goes to stderr."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Until the end, file descriptor 1 and sys.stdout are those of stderr; and again when the process exits."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)
        atexit.register(_close)  # after the engine's own: runs before them


def _close() -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        os.dup2(2, 1)
