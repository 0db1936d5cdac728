"""What an option is: a field with its default and help, and what its values are held against."""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Any

from mmquant.errors import InputError

SEEDS = 2**32 - 1  # what numpy and torch take


def option(default: object = None, text: str | None = None, **how: object) -> Any:  # noqa: ANN401 - as dataclasses.field
    """A field that is also an option.

    how: `choices`, `least` and `most`, `kind` (size, path, file, layers), `shown` for the default.
    """
    return field(default=default, metadata={"help": text, **how})


class Checked:
    """Values are held against what the field allows, as the command line holds what is typed: InputError."""

    def __post_init__(self) -> None:
        for found in fields(self):  # type: ignore[arg-type]
            value, allowed = getattr(self, found.name), found.metadata
            flag = f"--{found.name.replace('_', '-')} {value}"
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{flag}: expected a finite number")
            if "choices" in allowed and value not in allowed["choices"]:
                raise InputError(f"{flag}: expected one of {', '.join(map(str, allowed['choices']))}")
            if "least" in allowed and not allowed["least"] <= value <= allowed.get("most", value):
                more = (
                    f"{allowed['least']} to {allowed['most']}" if "most" in allowed else f"{allowed['least']} or more"
                )
                raise InputError(f"{flag}: expected {more}")
