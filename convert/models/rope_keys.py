"""RoPE scaling in GGUF metadata, as llama.cpp's loader reads it for every architecture.

Source: llama.cpp src/llama-model.cpp (load_hparams: type, factor, original_context_length, attn_factor),
src/llama-context.cpp (YaRN's own attention factor times attn_factor). It reads no YaRN betas for minimax-m2.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from mmquant.errors import InputError

from .rope import BETA_FAST, BETA_SLOW, DEFAULT, LINEAR, YARN, RopeScaling, usual_attention_factor

PREFIX = "rope.scaling."
TYPES = {"none": DEFAULT, LINEAR: LINEAR, YARN: YARN}  # llama.cpp's names: config.json's


def scaling_values(scaling: RopeScaling | None) -> dict[str, tuple[str, Any]]:
    """Keys (without the architecture) with their kinds and values; none without scaling.

    Raises InputError for what llama.cpp would not compute.
    """
    if scaling is None:
        return {}
    values: dict[str, tuple[str, Any]] = {"type": ("str", scaling.kind), "factor": ("f32", scaling.factor)}
    if scaling.kind == YARN:
        if (scaling.beta_fast, scaling.beta_slow) != (BETA_FAST, BETA_SLOW):
            said = f"beta_fast {scaling.beta_fast:g} and beta_slow {scaling.beta_slow:g}"
            raise InputError(f"config.json: YaRN with {said}: llama.cpp computes 32 and 1 for MiniMax-M2 only")
        values["original_context_length"] = ("u32", scaling.original_context)
        share = scaling.attention_factor / scaling.usual_attention_factor
        if not math.isclose(share, 1.0, rel_tol=1e-6):
            values["attn_factor"] = ("f32", share)
    return {PREFIX + key: value for key, value in values.items()}


def rope_parameters(metadata: Mapping[str, Any], arch: str, label: str) -> dict[str, Any] | None:
    """config.json's rope_parameters (without theta) of a file's metadata; None without scaling.

    InputError for what is malformed.
    """
    found = {key: metadata.get(f"{arch}.{PREFIX}{key}") for key in ("type", "factor", "attn_factor")}
    factor = found["factor"] if found["factor"] is not None else metadata.get(f"{arch}.rope.scale_linear")
    kind = TYPES.get(str(found["type"] or LINEAR))
    if kind is None:
        kinds = ", ".join(TYPES)
        raise InputError(f"{label}: {arch}.{PREFIX}type is {reprlib.repr(found['type'])}, expected {kinds}")
    share = 1.0 if found["attn_factor"] is None else found["attn_factor"]
    for key, value in (("factor", factor), ("attn_factor", share)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise InputError(f"{label}: {arch}.{PREFIX}{key} is {reprlib.repr(value)}, expected a number")
    if kind != YARN and share != 1:
        raise InputError(f"{label}: {arch}.{PREFIX}attn_factor is {share:g} without YaRN, expected none")
    if kind == DEFAULT or not factor or factor == 1:
        return None
    parameters: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == YARN:
        original = metadata.get(f"{arch}.{PREFIX}original_context_length")
        parameters |= {} if original is None else {"original_max_position_embeddings": original}
        parameters["attention_factor"] = share * usual_attention_factor(factor)
    return parameters
