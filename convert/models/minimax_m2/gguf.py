"""MiniMax-M2 in GGUF: keys and pre-tokenizer.

Source: llama.cpp src/models/minimax-m2.cpp, conversion/minimax.py.
"""

from __future__ import annotations

from typing import Any

from ..gguf import GgufFacts, Metadata, read_keys

ARCH = "minimax-m2"
# What `tokenizer.ggml.pre` = minimax-m2 stands for: the pattern of the release's tokenizer.json.
_MARKS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_MARKS[0]}]*[{_MARKS[1]}]+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_MARKS[0]}]+[{_MARKS[1]}]*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
GGUF = GgufFacts(arch=ARCH, pre="minimax-m2", pattern=_PATTERN)


def config(metadata: Metadata) -> dict[str, Any]:
    """config.json of a file's metadata, without vocabulary. Raises InputError."""
    return {"scoring_func": "sigmoid", **read_keys(metadata, ARCH, "sigmoid", "num_local_experts", "intermediate_size")}
