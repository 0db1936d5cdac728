"""Hold documents against the package's own JSON schemas.

`jsonschema.validate` would hold the schema itself against its own schema every time, four fifths of its time; tests do
so once.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, cast

import jsonschema
import jsonschema.exceptions

ValidationError = jsonschema.ValidationError


def schema(name: str) -> dict[str, Any]:
    """`mmquant/data/schema/mmquant-NAME-1.schema.json`."""
    path = resources.files("mmquant").joinpath("data", "schema", f"mmquant-{name}-1.schema.json")
    return json.loads(path.read_text("utf-8"))


def hold_to_schema(document: object, name: str) -> None:
    """ValidationError that says best where the document breaks the schema of this name."""
    validator: Any = jsonschema.Draft202012Validator(schema(name))
    faults: Any = cast("Any", jsonschema.exceptions)
    error: ValidationError | None = faults.best_match(validator.iter_errors(document))
    if error is not None:
        raise error
