"""Read and check the small files that an artifact takes over from its source, before anything is written."""

from __future__ import annotations

import json
import re
from typing import Any

from mmquant.errors import InputError

from .files.parse import parse_json
from .remote_code import code_files, with_code
from .source import CARRIED_FILES, Source

TOKENIZER = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"  # transformers' folder of named chat templates
_TEMPLATE = re.compile(rf"{TEMPLATES}/([^/\\\x00]+)\.jinja")


def parse_object(where: str, data: bytes) -> dict[str, Any]:
    """A JSON file's object. InputError, one line, when it is no UTF-8, no JSON or no object."""
    return parse_json(data, where)


def read_object(source: Source, name: str) -> dict[str, Any]:
    """A small JSON file of the source; empty when there is none."""
    data = source.small_file(name)
    return {} if data is None else parse_object(f"{source.label}: {name}", data)


def named_templates(source: Source) -> dict[str, str]:
    """File name by template's name, of transformers' folder of further chat templates, sorted."""
    matches = [match for file in source.file_names() if (match := _TEMPLATE.fullmatch(file))]
    return {match[1]: match[0] for match in sorted(matches, key=lambda match: match[0])}


def carried_files(source: Source) -> dict[str, bytes]:
    """Tokenizer, chat templates, generation config and licence, byte for byte; auto_map's code where it is complete.

    InputError for a .json that engines could not parse and a template that is not UTF-8.
    """
    names = (*CARRIED_FILES, *named_templates(source).values())
    found = {name: data for name in names if (data := source.small_file(name)) is not None}
    for name, data in found.items():
        where = f"{source.label}: {name}"
        if name.endswith(".json"):
            parse_object(where, data)
        elif name.endswith(".jinja"):
            decode(where, data)
    found |= code_files(source.config, source.small_file)
    if TOKENIZER in found:
        tokenizer = parse_object(TOKENIZER, found[TOKENIZER])
        kept = with_code(tokenizer, source.small_file)
        found |= code_files(kept, source.small_file)
        if kept != tokenizer:
            found[TOKENIZER] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def decode(where: str, data: bytes) -> str:
    """Bytes as text. InputError when they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8") from None
