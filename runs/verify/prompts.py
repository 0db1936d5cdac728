"""The prompts of `mmquant verify`: bundled, or from a user's file of the same form."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ...convert.files.parse import is_list, is_object, parse_yaml, read_small

CALLS, ANSWERS = ("weather", "order"), ("plain",)
RESULT = {"city": "Lisbon", "day": "tomorrow", "celsius": 21, "sky": "clear"}
WORDS = ("weather", "order", "plain", "tell")


@dataclass(frozen=True)
class Case:
    """One prompt.

    expects   "call": a tool has to be called; "answer": none; None: not judged
    language  in which the answer has to be; None: not judged
    tokens    names that the answer has to give in this order; empty: not judged
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    expects: str | None = None
    language: str | None = None
    tokens: tuple[str, ...] = field(default=())

    def body(self) -> dict[str, Any]:
        """The part of a request that belongs to the prompt. Keys keep the order of the file."""
        return {"messages": list(self.messages), **({"tools": list(self.tools)} if self.tools else {})}


def read_prompts(path: Path | None, languages: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """The cases of a file (None: the bundled one), of some languages alone where they are named. InputError."""
    where = str(path) if path is not None else "the bundled prompts"
    text = read_small(path, where, "a YAML file of prompts") if path is not None else _bundled()
    data: object = parse_yaml(text, where)
    if not is_object(data) or not is_object(data.get("languages")) or not is_list(data.get("tools")):
        raise InputError(f"{where}: expected the keys languages and tools, as in the bundled prompts")
    spoken: dict[str, Any] = data["languages"]
    for name in languages:
        if name not in spoken:
            raise InputError(f"--language {name}: expected one of {', '.join(spoken)}")
    tools = tuple(_tool(tool, where) for tool in data["tools"])
    chosen = {name: spoken[name] for name in languages or spoken}
    cases = [case for name, words in chosen.items() for case in _language(name, words, tools, where)]
    if not languages:
        cases += [_scenario(i, found, tools, where) for i, found in enumerate(data.get("scenarios") or [])]
    return tuple(cases)


def fingerprint(cases: tuple[Case, ...]) -> str:
    """SHA-256 of the prompts: results of two servers are compared only where it is the same."""
    text = json.dumps([[c.id, c.body(), c.expects, c.language, c.tokens] for c in cases], ensure_ascii=False)
    return sha256(text.encode()).hexdigest()


def _bundled() -> str:
    return resources.files("mmquant").joinpath("data", "verify", "prompts.yaml").read_text("utf-8")


def _tool(tool: object, where: str) -> dict[str, Any]:
    import jsonschema

    function = tool.get("function") if is_object(tool) else None
    if not is_object(tool) or not is_object(function) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: tools: expected function: {{name, parameters}}")
    try:
        jsonschema.Draft202012Validator.check_schema(function.get("parameters", {}))
    except jsonschema.SchemaError as error:
        raise InputError(f"{where}: {function['name']}: {error.message[:200]}, expected a JSON Schema") from None
    return tool


def _language(name: str, words: object, tools: tuple[dict[str, Any], ...], where: str) -> list[Case]:
    if not is_object(words) or any(not isinstance(words.get(word), str) for word in WORDS):
        raise InputError(f"{where}: languages/{name}: expected the texts {', '.join(WORDS)}")
    said = {word: {"role": "user", "content": words[word]} for word in WORDS}
    calls = [Case(f"{name}/{w}", (said[w],), tools, "call") for w in CALLS]
    answers = [Case(f"{name}/{w}", (said[w],), tools, "answer", name) for w in ANSWERS]
    call = {"name": "get_weather", "arguments": json.dumps({"city": "Lisbon", "day": "tomorrow"})}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]}
    told = {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(RESULT)}
    result = Case(f"{name}/result", (said["weather"], asked, told), tools, "answer", name)
    return [*calls, *answers, result, Case(f"{name}/tell", (said["tell"],), (), None, name)]


def _scenario(index: int, found: object, tools: tuple[dict[str, Any], ...], where: str) -> Case:
    tokens = found.get("tokens") if is_object(found) else None
    if not is_object(found) or not isinstance(found.get("ask"), str) or not is_list(tokens):
        raise InputError(f"{where}: scenarios/{index}: expected ask and tokens")
    message = {"role": "user", "content": found["ask"]}
    return Case(f"scenario/{index}", (message,), tools, None, None, tuple(map(str, tokens)))
