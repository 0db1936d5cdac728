"""The row of MiniMax-M2 in the table of architectures."""

from __future__ import annotations

from ..architecture import Architecture, ChatNotation
from .geometry import CLASS_NAME, MODEL_TYPE, Geometry
from .names import CODE_FILES
from .text import LICENCE, thinking, tool_calls, tools_prompt

ARCHITECTURE = Architecture(
    model_type=MODEL_TYPE,
    class_name=CLASS_NAME,
    geometry=Geometry.from_config,
    code_files=CODE_FILES,
    chat=ChatNotation(tool_calls, thinking, tools_prompt),
    licence=LICENCE,
)
