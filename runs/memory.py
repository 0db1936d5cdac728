"""Explain out-of-memory errors: what was being done, what was asked for, what is free, what helps."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmquant.errors import FitError
from mmquant.tables import gib

HELP = "fewer or shorter windows (--windows, --context), --effort fast or --device cpu need less"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch (CPU or CUDA) or the system had no more memory to give."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # By name: the command line looks at errors of runs that never loaded torch.
    cuda = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in str(error)
    return cuda or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def does_not_fit(error: BaseException, what: str = "") -> FitError:
    """FitError (exit 5) for an error that `is_out_of_memory`; `what` was being done."""
    asked = re.search(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.,]+ \w+)", str(error))
    free = re.search(r"of which ([\d.]+ \w+) is free", str(error))
    have = free[1] if free else _available()
    words = "out of memory" + (f": {asked[1]} asked for" if asked else "") + (f", {have} are free" if have else "")
    return FitError(f"{what + ': ' if what else ''}{words}; {HELP}")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what was being done when memory runs out inside: FitError in place of the library's own error."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(error, what) from error


def _available() -> str:
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"^MemAvailable: *(\d+) kB", file.read(), re.M)
    except OSError:
        return ""
    return gib(int(found[1]) * 1024) if found else ""
