"""Front matter of a model card: keep the owner's fields, never invent a licence or a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmquant.errors import InputError

from .files.parse import is_list, is_object, parse_yaml
from .licence import PERMISSIVE, PROHIBITED, UNKNOWN_NAME, judge

LICENSE_FIELDS = ("license", "license_name", "license_link")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def split_card(text: str, where: str = "README.md") -> tuple[dict[str, Any], str]:
    """(front matter, body) of a card; InputError when the front matter is no YAML mapping."""
    match = re.match(r"\A\ufeff?---[ \t\r]*\n(.*?)\n---[ \t\r]*(?:\n|\Z)", text, re.DOTALL)
    if not match:
        return {}, text
    data: object = parse_yaml(match[1], f"{where}: the front matter") or {}
    if not is_object(data):
        raise InputError(f"{where}: the front matter is a {type(data).__name__}, expected keys and values")
    return data, re.sub(r"\A(?:[ \t\r]*\n)+", "", text[match.end() :])


def license_fields(base_card: str | None, license_text: str) -> dict[str, Any]:
    """The base card's licence fields as they stand there; from the licence file where they say nothing.

    InputError for a permissive licence on a card beside a licence file that forbids commercial use.
    """
    found = split_card(base_card, "the base model's card")[0] if base_card else {}
    return named_licence(found, license_text, "the base model's card")


def named_licence(front: Mapping[str, Any], license_text: str, where: str) -> dict[str, Any]:
    """The licence fields of a front matter, verbatim; what is missing comes from the licence file."""
    fields = {key: front[key] for key in LICENSE_FIELDS if front.get(key) not in (None, "")}
    judged = judge(license_text)
    if "license" not in fields:
        fields = {"license": judged.id} | fields
        if judged.id == "other":
            fields.setdefault("license_link", "LICENSE")
    if fields["license"] == "other":
        fields.setdefault("license_name", judged.name or UNKNOWN_NAME)
    check_license(fields, license_text, where)
    return {key: fields[key] for key in LICENSE_FIELDS if key in fields}


def check_license(fields: Mapping[str, Any], license_text: str, where: str) -> None:
    """InputError for a card that permits what the licence file forbids."""
    said = str(fields.get("license", "")).strip().lower()
    if PERMISSIVE.fullmatch(said) and judge(license_text).use == PROHIBITED:
        raise InputError(f"{where}: license: {said}, but the licence file forbids commercial use; expected its licence")


def base_models(front: Mapping[str, Any], where: str) -> list[str]:
    """Repositories that a front matter names as base_model; InputError for what is none (a folder's name)."""
    value = front.get("base_model")
    named = value if is_list(value) else [] if value in (None, "") else [value]
    for name in named:
        if not is_repository(name):
            raise InputError(f"{where}: base_model {name!r}, expected ORG/NAME (or give --base-model)")
    return [str(name) for name in named]


def is_repository(name: object) -> bool:
    """Whether this can be a hub's ORG/NAME: a folder's name alone never is."""
    return isinstance(name, str) and bool(REPOSITORY.fullmatch(name)) and ".." not in name
