"""Matrices packed by compressed-tensors itself, and a folder in which every projection has another width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ct_reader import BaseCompressor, QuantizationScheme


def settings(bits: int, strategy: str, symmetric: bool, group: int, kind: str = "int") -> dict[str, Any]:
    said = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    return said | ({"group_size": group} if strategy == "group" else {})


def random_state(shape: tuple[int, int], weights: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """What a compressor takes: weights that reach every code and beyond, float32 scales, zero points."""
    draw = torch.Generator().manual_seed(seed)
    groups = {"tensor": (1,), "channel": (shape[0], 1)}.get(weights["strategy"])
    if weights["strategy"] == "block":
        height, width = weights["block_structure"]
        groups = (-(-shape[0] // height), -(-shape[1] // width))
    groups = groups or (shape[0], shape[1] // weights["group_size"])
    half = 1 << (weights["num_bits"] - 1)
    scales = torch.rand(groups, generator=draw) + 0.5
    state = {"weight": torch.randn(shape, generator=draw) * half, "weight_scale": scales}
    if not weights["symmetric"]:
        zeros = torch.randint(-half, half, groups, generator=draw)
        state["weight_zero_point"] = zeros.to(torch.float8_e4m3fn if weights["type"] == "float" else torch.int8)
    return state


def theirs(kind: str, weights: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """(stored tensors, values) by compressed-tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=kind)  # type: ignore[arg-type]
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(dict(state), scheme)
    values = compressor.decompress(dict(stored), scheme)["weight"]
    assert values is not None
    return {suffix: part for suffix, part in stored.items() if part is not None}, values.float()


WIDTHS = {
    "q_proj": ("pack-quantized", settings(3, "group", False, 32)),
    "k_proj": ("pack-quantized", settings(2, "channel", True, 0)),
    "v_proj": ("int-quantized", settings(8, "tensor", False, 0)),
    "o_proj": ("float-quantized", settings(8, "group", True, 64, "float")),
    "w1": ("pack-quantized", settings(5, "group", True, 128)),
    "w2": ("pack-quantized", settings(6, "tensor", False, 0)),
    "w3": ("naive-quantized", settings(7, "channel", False, 0)),
}
SKIPPED = r"re:.*experts\.3\.w[12]$"


def mixed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every projection of the random model stored in another width, two matrices left alone."""
    groups = {
        f"g{place}": {"targets": [rf"re:.*\.{last}$"], "weights": weights, "format": kind}
        for place, (last, (kind, weights)) in enumerate(WIDTHS.items())
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ["lm_head", SKIPPED],
    }
    for name in [n for n in tensors if n.removesuffix(".weight").rpartition(".")[2] in WIDTHS]:
        if name.endswith(("experts.3.w1.weight", "experts.3.w2.weight")):
            continue
        stem = name.removesuffix(".weight")
        kind, weights = WIDTHS[stem.rpartition(".")[2]]
        state = random_state(tuple(tensors.pop(name).shape), weights, seed=len(tensors))  # type: ignore[arg-type]
        stored, _ = theirs(kind, weights, state)
        tensors |= {f"{stem}.{suffix}": part for suffix, part in stored.items()}
