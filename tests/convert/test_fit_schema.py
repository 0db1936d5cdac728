"""The manifest's schema is a valid JSON Schema, accepts its example and refuses what it must."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from helpers.paths import DATA, PACKAGE

SCHEMA = json.loads((PACKAGE / "data" / "schema" / "mmquant-fit-1.schema.json").read_text())
EXAMPLE = json.loads((DATA / "fit-example.json").read_text())


def test_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_example_is_accepted() -> None:
    jsonschema.validate(EXAMPLE, SCHEMA)


@pytest.mark.parametrize("path", [("schema",), ("model",), ("artifacts",), ("artifacts", 0, "files", 0, "sha256")])
def test_missing_parts_are_refused(path: tuple[str | int, ...]) -> None:
    broken: Any = copy.deepcopy(EXAMPLE)
    part = broken
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_a_digest_is_64_hex_digits() -> None:
    broken = copy.deepcopy(EXAMPLE)
    broken["artifacts"][0]["files"][0]["sha256"] = "0" * 63
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)
