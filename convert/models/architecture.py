"""What the rest of the program asks of a model architecture: one frozen row of facts and functions each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .geometry import Geometry, LayerRules
from .gguf import GgufFacts, Metadata
from .names import TensorNames


@dataclass(frozen=True)
class NamedLicence:
    """A non-commercial licence of the makers: the word of its file that tells it, its name on cards, its address."""

    word: str
    name: str
    link: str


@dataclass(frozen=True)
class ChatNotation:
    """How the model writes what a chat template leaves out."""

    tool_calls: Callable[[list[dict[str, Any]]], str]  # of one message: names and arguments
    thinking: Callable[[str], str]
    tools_prompt: Callable[[list[str]], str]  # tools as JSON texts


@dataclass(frozen=True, eq=False)
class Architecture:
    """One architecture; `models.ARCHITECTURES` has them by model_type."""

    model_type: str  # of config.json
    class_name: str  # among its architectures
    geometry: Callable[[dict[str, Any]], Geometry]  # config.json -> sizes; InputError for what is malformed
    names: TensorNames
    rules: LayerRules
    gguf: GgufFacts
    gguf_config: Callable[[Metadata], dict[str, Any]]  # config.json of a GGUF file's keys, without its vocabulary
    code_files: tuple[str, ...]  # that the release carries for trust_remote_code
    chat: ChatNotation
    licence: NamedLicence | None = None
