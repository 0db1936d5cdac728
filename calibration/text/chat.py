"""Render conversations with the checkpoint's own chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import TemplateError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mmquant.errors import InputError

from ...convert.chat_templates import DEFAULT, TOOL_USE, Template, chat_templates
from ...convert.models import DEFAULT_ARCHITECTURE, architecture_of
from ...convert.models.architecture import ChatNotation
from ...convert.source import Source
from ...convert.special_tokens import special_tokens
from .rows import Chat
from .sandbox import Sandbox, measured, render


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} of training templates: only the body counts here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may name."""

    source: str
    tokens: dict[str, str]
    label: str
    with_tools: ChatTemplate | None = None  # another one for chats that have tools
    notation: ChatNotation = DEFAULT_ARCHITECTURE.chat

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The environment of transformers' apply_chat_template: sandboxed, trimmed blocks, loop controls, strftime_now.
        environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], undefined=Undefined
        )
        environment.filters["tojson"] = measured(_tojson, "tojson")
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime(2026, 1, 1).strftime(form)
        return environment.from_string(self.source)

    def render(self, chat: Chat) -> str:
        """The conversation as one text. Raises InputError with the template's own complaint, on one line."""
        if chat.tools and self.with_tools is not None:
            return self.with_tools.render(chat)
        messages = [self._plain(message) for message in self._with_tools(chat)]
        tools = list(chat.tools) if chat.tools else None
        try:
            given = {"messages": messages, "tools": tools, "add_generation_prompt": False, **self.tokens}
            return render(self._compiled, given)
        except Exception as error:  # a template is a program of somebody else's: whatever it raises is its fault
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise InputError(f"{self.label}: {kind}{reason}") from None

    def _with_tools(self, chat: Chat) -> tuple[dict[str, Any], ...]:
        """Describe the tools in the system message, as M2's template does, when the template does not name them."""
        if not chat.tools or "tools" in self.source:
            return chat.messages
        head = chat.messages[0] if chat.messages[0]["role"] == "system" else {"role": "system", "content": ""}
        tools = self.notation.tools_prompt([_tojson(tool.get("function", tool)) for tool in chat.tools])
        content = f"{head['content']}\n\n{tools}".lstrip("\n")
        rest = chat.messages[1:] if head is chat.messages[0] else chat.messages
        return ({**head, "content": content}, *rest)

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        """Fold thinking and tool calls into the content, in M2's notation, when the template does not render them."""
        message = dict(message)
        parts = [message.get("content") or ""]
        if "reasoning_content" in message and "reasoning_content" not in self.source:
            parts.insert(0, self.notation.thinking(message.pop("reasoning_content")))
        if "tool_calls" in message and "tool_calls" not in self.source:
            parts.append(self.notation.tool_calls([call["function"] for call in message.pop("tool_calls")]))
        return {**message, "content": "\n".join(part for part in parts if part)}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **form: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **form)


def load_template(source: Source) -> ChatTemplate | None:
    """The checkpoint's chat template (chat_templates.py says where it is looked for); None when it has none."""
    found = chat_templates(source)
    if not found:
        return None
    tokens = {f"{kind}_token": t.text for kind, t in special_tokens(source).items() if t.text is not None}
    notation = architecture_of(source.config).chat
    tools = found.get(TOOL_USE)
    with_tools = ChatTemplate(tools.text, tokens, tools.where, notation=notation) if tools is not None else None
    plain = found.get(DEFAULT)
    if plain is None:  # as transformers: only what was named can be asked for
        complaint = f"none is called {DEFAULT}, only {', '.join(sorted(found))}"
        plain = Template(f"{{{{ raise_exception({complaint!r}) }}}}", f"{source.label}: chat templates")
    return ChatTemplate(plain.text, tokens, plain.where, with_tools, notation)
