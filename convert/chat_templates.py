"""Find a model's chat templates, by the same rules for every command and format.

As transformers' tokenizers find them: chat_template.jinja with the named ones of additional_chat_templates/ wins, then
tokenizer_config.json's chat_template, one or a list of named ones. A processor's chat_template.json comes last. Empty
and null are absent. Source: transformers, tokenization_utils_base.py (from_pretrained, get_chat_template).
"""

from __future__ import annotations

from dataclasses import dataclass

from mmquant.errors import InputError

from .carried import decode, named_templates, read_object
from .files.parse import are, is_list, is_object
from .source import Source

DEFAULT, TOOL_USE = "default", "tool_use"


@dataclass(frozen=True)
class Template:
    """A template's text and where it stands."""

    text: str
    where: str


def chat_templates(source: Source) -> dict[str, Template]:
    """Templates by name (`default`, `tool_use`, ...); empty when there is none. InputError for one that is no text."""
    names = {DEFAULT: "chat_template.jinja", **named_templates(source)}
    found = {}
    for name, file in names.items():
        data = source.small_file(file)
        if data is not None and data.strip():
            where = f"{source.label}/{file}"
            found[name] = Template(decode(where, data), where)
    for file in ("tokenizer_config.json", "chat_template.json"):
        if not found:
            where = f"{source.label}/{file}"
            texts = _named(read_object(source, file).get("chat_template"), where)
            found = {name: Template(text, where) for name, text in texts.items() if text.strip()}
    return found


def _named(value: object, where: str) -> dict[str, str]:
    if value is None or isinstance(value, str):
        return {DEFAULT: value or ""}
    if is_list(value) and are(value, dict):
        pairs: list[tuple[object, object]] = [(item.get("name"), item.get("template")) for item in value]
    elif is_object(value):
        pairs = list(value.items())
    else:
        raise InputError(f"{where}: chat_template is a {type(value).__name__}, expected text or a list of named ones")
    named: dict[str, str] = {}
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise InputError(f"{where}: chat_template {name!r} is no text, expected a name and a template")
        named[name] = text or ""
    return named
