"""What a diagnosis finds in an artifact."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One fault: `error` when the artifact gives wrong results, else a warning; `where` a tensor or key."""

    level: str
    where: str
    text: str
    experts: tuple[int, ...] = ()
    code: str = ""  # convert/gguf/doctor.py OVERFLOW: a sum beyond float16, which rescaling mends
