"""What the rest of the program asks of a model architecture: one frozen row of facts and functions each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
class Serving:
    """How engines serve the model, and what a card says of its use.

    vllm, sglang  flags that name the parsers of tool calls and of thinking
    prompt        one turn as the chat template writes it
    markup        regular expression of the tags of its thinking and tool calls, which a server's parsers take away
    agents        what its makers measured of agents, rates by the names of runs/verify/score.py; of what; where
    """

    vllm: tuple[str, ...]
    sglang: tuple[str, ...]
    sampling: Mapping[str, float]
    prompt: str
    thinking: str
    markup: str = ""
    agents: Mapping[str, float] = field(default_factory=dict[str, float])
    agents_of: str = ""
    agents_source: str = ""


@dataclass(frozen=True, eq=False)
class Architecture:
    """One architecture; `models.ARCHITECTURES` has them by model_type."""

    model_type: str  # of config.json
    class_name: str  # among its architectures
    geometry: Callable[[dict[str, Any]], Geometry]  # config.json -> sizes; InputError for what is malformed
    names: TensorNames
    rules: LayerRules
    experts_key: str  # of config.json: how many experts a layer has
    gguf: GgufFacts
    gguf_config: Callable[[Metadata], dict[str, Any]]  # config.json of a GGUF file's keys, without its vocabulary
    code_files: tuple[str, ...]  # that the release carries for trust_remote_code
    chat: ChatNotation
    licence: NamedLicence | None = None
    releases: Mapping[str, dict[str, Any]] = field(
        default_factory=dict[str, dict[str, Any]]
    )  # ORG/NAME -> config.json, known offline
    serving: Serving | None = None
    mlx_config: Mapping[str, Any] = field(default_factory=dict[str, Any])  # keys that mlx_lm wants in config.json
