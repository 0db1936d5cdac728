"""The row of MiniMax-M2 in the table of architectures."""

from __future__ import annotations

from ..architecture import Architecture, ChatNotation
from ..geometry import LayerRules
from .geometry import Geometry
from .gguf import GGUF, config
from .names import CODE_FILES, NAMES
from .release import RELEASES, SERVING
from .text import LICENCE, thinking, tool_calls, tools_prompt

ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    class_name="MiniMaxM2ForCausalLM",
    geometry=Geometry.from_config,
    names=NAMES,
    rules=LayerRules(scoring="sigmoid", qk_norm="layer"),
    experts_key="num_local_experts",
    gguf=GGUF,
    gguf_config=config,
    code_files=CODE_FILES,
    chat=ChatNotation(tool_calls, thinking, tools_prompt),
    serving=SERVING,
    licence=LICENCE,
    releases=RELEASES,
    mlx_config={"shared_intermediate_size": 0},
)
