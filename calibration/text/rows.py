"""Parse one row of a data set as text or conversation, in the published forms.

Known: text; messages (role, content); conversations of ShareGPT (from, value); Alpaca (instruction, input, output,
system, history); prompt and completion, as text or as messages. Empty and null fields are absent fields.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from ...convert.files.parse import are, is_list, is_object

ROLES = ("system", "user", "assistant", "tool")
KNOWN = (
    "text | messages [role, content] | conversations [from, value] | instruction, input, output | prompt, completion"
)
_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system"}
_ALIASES |= {"function": "tool", "observation": "tool", "function_call": "assistant"}
_THINKING = ("reasoning_content", "reasoning", "thinking")
_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("output", "completion", "response", "answer", "chosen")
_CONTEXTS = ("input", "context")


@dataclass(frozen=True)
class Chat:
    """One conversation: messages in the OpenAI form (role, content, reasoning_content, tool_calls) and its tools."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]


def parse_line(line: str) -> Chat | str:
    """One JSONL line. Raises InputError saying why not."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        raise InputError(f"not JSON ({error})") from None
    return parse_row(data)


def parse_row(data: object) -> Chat | str:
    """One row: a text, or a chat. Raises InputError naming the keys that were found and the known forms."""
    if isinstance(data, str):  # a list of texts
        return data
    if not is_object(data):
        raise InputError(f"a JSON {type(data).__name__}, expected an object")
    row = {key: value for key, value in data.items() if _there(value)}
    if isinstance(row.get("text"), str):
        return row["text"]
    messages = next((row[key] for key in _LISTS if key in row), None)
    messages = messages if messages is not None else _question(row)
    if messages is None:
        for key in ("text", *_ANSWERS):  # a row of a known form that says nothing, as data sets of lines have them
            if data.get(key) == "":
                return ""
        found = ", ".join(repr(str(key)[:40]) for key in list(data)[:8]) or "none"
        raise InputError(f"keys {found}: no known form, expected {KNOWN}")
    if not isinstance(messages, list):
        raise InputError(f"messages are a {type(messages).__name__}, expected a list")
    head = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    checked = (_message(number, message) for number, message in enumerate([*head, *messages], 1 - len(head)))
    return Chat(tuple(checked), _tools(row.get("tools") or []))


def _there(value: object) -> bool:
    """Whether a field says anything: null, "", [] and {} are absent."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _tools(tools: object) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):  # as LLaMA-Factory has them
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = None
    if not is_list(tools) or not are(tools, dict):
        raise InputError('"tools" is not a list of objects')
    return tuple(tools)


def _question(row: dict[str, Any]) -> list[Any] | None:
    """Messages of a question and its answer, however they are called; None when there is no such pair."""
    asked = next((row[key] for key in _QUESTIONS if key in row), None)
    answer = next((row[key] for key in _ANSWERS if key in row), None)
    if isinstance(answer, list) and all(isinstance(item, dict) for item in answer):
        return [*asked, *answer] if isinstance(asked, list) and row.get("chosen") is not answer else answer
    if not isinstance(asked, str) or not isinstance(answer, str):
        return None
    context = next((row[key] for key in _CONTEXTS if isinstance(row.get(key), str)), None)
    turns = [(asked if context is None else f"{asked}\n\n{context}", answer)]
    history = row.get("history")
    if isinstance(history, list):
        turns = [tuple(turn) for turn in history if isinstance(turn, list) and len(turn) == 2] + turns
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _message(number: int, message: object) -> dict[str, Any]:
    where = f"message {number}"
    if not is_object(message):
        raise InputError(f"{where} is a {type(message).__name__}, expected an object")
    out = {key: value for key, value in message.items() if key == "content" or _there(value)}
    if "role" not in out and "from" in out:
        out = _sharegpt(out)
    role = out.get("role")
    out["role"] = _ALIASES.get(role, role) if isinstance(role, str) else role
    if out["role"] not in ROLES:
        raise InputError(f"{where} has role {message.get('role', message.get('from'))!r}, expected {', '.join(ROLES)}")
    content = out.get("content")
    if isinstance(content, list):  # [{"type": "text", "text": ...}, ...]
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where} has content of type {type(content).__name__}, expected a string")
    thinking = next((out.pop(key) for key in _THINKING if isinstance(out.get(key), str)), None)
    if thinking is not None:
        out["reasoning_content"] = thinking
    if content is None and not out.get("tool_calls") and thinking is None:
        raise InputError(f"{where} has neither content nor tool_calls")
    out["content"] = content
    if "tool_calls" in out:
        calls = out["tool_calls"]
        out["tool_calls"] = [_call(where, call) for call in (calls if isinstance(calls, list) else [calls])]
    return out


def _sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """from and value as role and content; a function call in the value is one."""
    out = {key: value for key, value in message.items() if key not in ("from", "value")}
    out |= {"role": message["from"], "content": message.get("value", message.get("content"))}
    if message["from"] == "function_call" and isinstance(out["content"], str):
        try:
            call = json.loads(out["content"])
        except (ValueError, RecursionError):
            return out
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            out |= {"content": None, "tool_calls": [call]}
    return out


def _call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function", call) if is_object(call) else None
    if not is_object(function) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without a function name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError(f"{where} calls {function['name']} with arguments that are not JSON") from None
    if not isinstance(arguments, dict):
        raise InputError(f"{where} calls {function['name']} with arguments that are not an object")
    return {"type": "function", "function": {**function, "arguments": arguments}}
