"""What a GGUF artifact is asked to be: a mix of types, changed by overrides or a plan file; laid out by plan.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .mixes import Mix
from .writer import PART_BYTES


@dataclass(frozen=True)
class GgufVariant:
    """What is asked for: a stock mix, changed by overrides or a plan.

    stem        name of the file without .gguf
    importance  whether calibration steers the codes
    settings    whatever else decides the bytes, in words; recorded as mmquant.* and in the manifest
    """

    mix: Mix
    stem: str
    importance: bool
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()
    plan: dict[str, str] | None = None
    part_bytes: int = PART_BYTES
    settings: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"GGUF-{self.mix.name}" + ("-custom" if self.plan or self.overrides else "")

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from source and calibration."""
        overrides = [f"{pattern.pattern}={kind}" for pattern, kind in self.overrides]
        return {
            "command": "gguf",
            "type": self.mix.name,
            "name": self.stem,
            "tensor_types": overrides,
            "plan": self.plan,
            **self.settings,
        }
