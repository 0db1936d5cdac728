"""Chat notation and licence of the MiniMax-M2 releases."""

from __future__ import annotations

import json
from typing import Any

from ..architecture import NamedLicence

CALL_OPEN, CALL_CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
# The non-commercial licence of M2.7, by the words of its file.
LICENCE = NamedLicence(
    word="minimax",
    name="minimax-m2.7-non-commercial",
    link="https://huggingface.co/MiniMaxAI/MiniMax-M2.7/blob/main/LICENSE",
)


def tool_calls(functions: list[dict[str, Any]]) -> str:
    """Tool calls of one message (name, arguments) in the notation that the model was trained on."""
    calls = "\n".join(_invocation(function) for function in functions)
    return f"{CALL_OPEN}\n{calls}\n{CALL_CLOSE}"


def _invocation(function: dict[str, Any]) -> str:
    lines = [f'<invoke name="{function["name"]}">']
    arguments: dict[str, Any] = function.get("arguments") or {}
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f'<parameter name="{name}">{text}</parameter>')
    return "\n".join([*lines, "</invoke>"])


def thinking(text: str) -> str:
    """A message's reasoning in front of its content."""
    return f"<think>\n{text}\n</think>\n"


def tools_prompt(tools: list[str]) -> str:
    """Tools (JSON, one each) as the system message describes them."""
    listed = "\n".join(f"<tool>{tool}</tool>" for tool in tools)
    return f"# Tools\n<tools>\n{listed}\n</tools>"
