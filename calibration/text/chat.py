"""Chats as the model sees them: JSONL conversations rendered with the checkpoint's own chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, Undefined
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmquant.errors import InputError

from ...convert.source import Source

ROLES = ("system", "user", "assistant", "tool")
CALL_OPEN, CALL_CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"


@dataclass(frozen=True)
class Chat:
    """One conversation: messages in the OpenAI form (role, content, reasoning_content, tool_calls) and its tools."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may name."""

    source: str
    tokens: dict[str, str]
    label: str

    @cached_property
    def _compiled(self) -> Any:
        # The environment of transformers' apply_chat_template: sandboxed, trimmed blocks, loop controls, strftime_now.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], undefined=Undefined
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime(2026, 1, 1).strftime(form)
        return environment.from_string(self.source)

    def render(self, chat: Chat) -> str:
        """The conversation as one text. Raises ValueError with the template's own complaint."""
        messages = [self._plain(message) for message in self._with_tools(chat)]
        tools = list(chat.tools) if chat.tools else None
        try:
            return self._compiled.render(messages=messages, tools=tools, add_generation_prompt=False, **self.tokens)
        except (TemplateError, TypeError) as error:
            raise InputError(f"{self.label}: {error}") from None

    def _with_tools(self, chat: Chat) -> tuple[dict[str, Any], ...]:
        """Describe the tools in the system message, as M2's template does, when the template does not name them."""
        if not chat.tools or "tools" in self.source:
            return chat.messages
        head = chat.messages[0] if chat.messages[0]["role"] == "system" else {"role": "system", "content": ""}
        tools = "\n".join(f"<tool>{_tojson(tool.get('function', tool))}</tool>" for tool in chat.tools)
        content = f"{head['content']}\n\n# Tools\n<tools>\n{tools}\n</tools>".lstrip("\n")
        rest = chat.messages[1:] if head is chat.messages[0] else chat.messages
        return ({**head, "content": content}, *rest)

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        """Fold thinking and tool calls into the content, in M2's notation, when the template does not render them."""
        message = dict(message)
        parts = [message.get("content") or ""]
        if "reasoning_content" in message and "reasoning_content" not in self.source:
            parts.insert(0, f"<think>\n{message.pop('reasoning_content')}\n</think>\n")
        if "tool_calls" in message and "tool_calls" not in self.source:
            calls = "\n".join(invocation(call["function"]) for call in message.pop("tool_calls"))
            parts.append(f"{CALL_OPEN}\n{calls}\n{CALL_CLOSE}")
        return {**message, "content": "\n".join(part for part in parts if part)}


def invocation(function: dict[str, Any]) -> str:
    """One tool call in M2's XML notation."""
    lines = [f'<invoke name="{function["name"]}">']
    for name, value in (function.get("arguments") or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f'<parameter name="{name}">{text}</parameter>')
    return "\n".join([*lines, "</invoke>"])


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def load_template(source: Source) -> ChatTemplate | None:
    """The checkpoint's chat template: chat_template.jinja, else tokenizer_config.json; None when it has none."""
    config = source.small_file("tokenizer_config.json")
    settings = json.loads(config) if config is not None else {}
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    file = source.small_file("chat_template.jinja")
    if file is not None:
        return ChatTemplate(file.decode(), tokens, f"{source.label}/chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, str):
        return ChatTemplate(template, tokens, f"{source.label}/tokenizer_config.json")
    return None


def parse_line(line: str) -> Chat | str:
    """One JSONL line: {"messages": [...], "tools": [...]} or {"text": "..."}. Raises ValueError saying why not."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(data, dict):
        raise InputError(f"a JSON {type(data).__name__}, expected an object")
    if isinstance(data.get("text"), str):
        return data["text"]
    messages = data.get("messages", data.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise InputError('no "messages" list and no "text"')
    tools = data.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError('"tools" is not a list of objects')
    checked = (_message(number, message) for number, message in enumerate(messages, 1))
    return Chat(tuple(checked), tuple(tools))


def _message(number: int, message: Any) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise InputError(f"{where} is a {type(message).__name__}, expected an object")
    if message.get("role") not in ROLES:
        raise InputError(f"{where} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    out = dict(message)
    content = out.get("content")
    if isinstance(content, list):  # [{"type": "text", "text": ...}, ...]
        out["content"] = content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where} has content of type {type(content).__name__}, expected a string")
    if content is None and not out.get("tool_calls"):
        raise InputError(f"{where} has neither content nor tool_calls")
    if "tool_calls" in out:
        out["tool_calls"] = [_call(where, call) for call in out["tool_calls"] or []]
    return out


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without a function name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            raise InputError(f"{where} calls {function['name']} with arguments that are not JSON") from None
    if not isinstance(arguments, dict):
        raise InputError(f"{where} calls {function['name']} with arguments that are not an object")
    return {"type": "function", "function": {**function, "arguments": arguments}}


def read_chats(path: Path, template: ChatTemplate | None) -> list[str]:
    """Every line of a JSONL file as text. Raises ValueError naming file, line and reason."""
    texts = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = parse_line(line)
            if isinstance(parsed, Chat):
                if template is None:
                    raise InputError("a chat, but the checkpoint has no chat template")
                parsed = template.render(parsed)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from None
        texts.append(parsed)
    return texts
