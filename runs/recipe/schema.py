"""The JSON Schema of a recipe, made of the options' own fields, so that a recipe takes what the commands take."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from ..evaluation.result import GATES
from ..option import Checked
from ..options import (
    Bf16Options,
    CalibrateOptions,
    Fp8Options,
    GgufOptions,
    Int4Options,
    MlxOptions,
    Mxfp4Options,
    Nvfp4Options,
    TextOptions,
)
from ..options_use import EvalOptions, FitOptions, PushOptions

# What a variant's `command` may be, and its options.
COMMANDS: dict[str, type[Checked]] = {
    "fp8": Fp8Options,
    "bf16": Bf16Options,
    "int4": Int4Options,
    "nvfp4": Nvfp4Options,
    "mxfp4": Mxfp4Options,
    "mlx": MlxOptions,
    "gguf": GgufOptions,
    "calibrate": CalibrateOptions,
}
NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a variant: it is the name of its folder
CHECK = ("text", "context", "stride", "windows", "convention", "activations", "seed", "dtype")
STRANGE = {"calibrate": ("layers", "propagate", "memory", "disk")}  # options that a recipe's variant does not take


def offered(options: type[Checked], command: str = "") -> list[dataclasses.Field[Any]]:
    """The fields of an options class that a recipe may set."""
    return [f for f in dataclasses.fields(options) if f.name not in STRANGE.get(command, ())]  # type: ignore[arg-type]


def field_schema(field: dataclasses.Field[Any], kind: object) -> dict[str, Any]:
    """The schema of one option; `kind`: its type."""
    how = field.metadata
    if "choices" in how:
        return {"enum": list(how["choices"])}
    if how.get("kind") == "size":
        return {"type": ["integer", "string"], "minimum": 1}
    kinds = [one for one in (typing.get_args(kind) or (kind,)) if one is not type(None)]
    if isinstance(field.default, tuple):
        return {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    if kinds == [bool]:
        return {"type": "boolean"}
    if kinds == [int]:
        limits = {"minimum": how.get("least"), "maximum": how.get("most")}
        return {"type": "integer", **{name: value for name, value in limits.items() if value is not None}}
    assert kinds in ([str], [Path]), (field.name, kind)
    return {"type": "string"}


def options_schema(options: type[Checked], names: typing.Collection[str] | None = None, command: str = "") -> Any:  # noqa: ANN401
    """Properties by option name."""
    kinds = typing.get_type_hints(options)
    chosen = [field for field in offered(options, command) if names is None or field.name in names]
    return {field.name: field_schema(field, kinds[field.name]) for field in chosen}


def _object(properties: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _variant(command: str, options: type[Checked]) -> dict[str, Any]:
    """What the variants of one command may say."""
    own = options_schema(options, command=command)
    texts = {"corpus": {"type": "string"}} if issubclass(options, TextOptions) else {}
    own |= {"command": {"const": command}, "gates": {"$ref": "#/$defs/gates"}, **texts}
    return {
        "if": {"properties": {"command": {"const": command}}, "required": ["command"]},
        "then": _object(own),
    }


def recipe_schema() -> dict[str, Any]:
    """The whole schema (draft 2020-12)."""
    size = {"type": ["integer", "string"], "minimum": 1}
    corpus = options_schema(TextOptions)
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    push = options_schema(PushOptions) | {"repo": {"type": "string"}, "variants": names}
    push |= {"as_completed": {"type": "boolean"}}
    limits = {"disk": size, "shards": {"type": "integer", "minimum": 1}, "ram": size, "gpu": size}
    gates = {name: {"type": "number"} for name in GATES}
    machines = options_schema(FitOptions, ("context",)) | {"targets": names, "machines": {"type": "string"}}
    properties = {
        "model": {"type": "string", "minLength": 1},
        "revision": {"type": "string", "minLength": 1},
        "device": {"type": "string", "pattern": "^(cpu|cuda(:[0-9]+)?)$"},
        "corpora": {"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": _object(corpus)},
        "variants": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {
                "type": "object",
                "required": ["command"],
                "properties": {"command": {"enum": list(COMMANDS)}},
                "allOf": [_variant(command, options) for command, options in COMMANDS.items()],
            },
        },
        "check": _object(options_schema(EvalOptions, CHECK) | {"gates": {"$ref": "#/$defs/gates"}}),
        "push": {"type": "array", "items": _object(push, required=["repo"])},
        "fit": _object(machines, required=["targets"]),
        "limits": _object(limits),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of mmquant run",
        **_object(properties, required=["model", "variants"]),
        "$defs": {"gates": _object(gates)},
    }
