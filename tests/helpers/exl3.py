"""An EXL3 folder of a checkpoint: 8 bits, mul1, each byte the nearest after the one before it (exllamav3 searches).

Close enough to the original to be compared with it. Layout: exllamav3 1.6.5, conversion/compile.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmquant.convert.open import open_source
from mmquant.convert.source import Source
from mmquant.quantize import trellis

Parts = dict[str, Tensor]
Encode = Callable[[str, Tensor], Parts | None]  # name and values [O, I] of a matrix -> its parts; None: plain
FINE = 4096  # steps of a target between -4 and 4
MUL1 = torch.tensor(0x83DCD12D - (1 << 32), dtype=torch.int32)
MCG = torch.tensor(0xCBAC1FED - (1 << 32), dtype=torch.int32)
MARKERS = {"mul1": {"mul1": MUL1}, "mcg": {"mcg": MCG}, "3inst": {}}
CONFIG: dict[str, Any] = {"quant_method": "exl3", "version": "1.6.5", "bits": 8, "head_bits": 8, "codebook": "mul1"}


def random_parts(shape: Sequence[int], words: int, book: str, seed: int = 0) -> Parts:
    """The parts of a matrix [O, I] from any bits: every stream means something."""
    g = torch.Generator().manual_seed(seed)
    outputs, inputs = (-(-side // 128) * 128 for side in shape)
    codes = torch.randint(-(1 << 15), 1 << 15, (inputs // 16, outputs // 16, words), generator=g).to(torch.int16)
    suh, svh = ((torch.randn(n, generator=g) * 0.2).half() for n in (inputs, outputs))
    return {"trellis": codes, "suh": suh, "svh": svh, **{name: value.clone() for name, value in MARKERS[book].items()}}


@cache
def _book() -> Tensor:
    return trellis.codebook("mul1", torch.device("cpu")).view(256, 256)  # the byte before, the byte


@cache
def _nearest() -> Tensor:
    """[256, FINE]: the best byte after each byte for each target."""
    targets = (torch.arange(FINE) + 0.5) * (8 / FINE) - 4
    ordered, order = _book().sort(-1)
    place = torch.searchsorted(ordered, targets.expand(256, -1).contiguous()).clamp(1, 255)
    nearer = (targets - ordered.gather(-1, place - 1)) > (ordered.gather(-1, place) - targets)
    return order.gather(-1, place - 1 + nearer.int())


def _lanes() -> Tensor:
    """[256]: the place in a tile, row by row, of each weight of the stream."""
    lane, j = torch.arange(256) // 8, torch.arange(256) % 8
    row = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])[j % 4]
    return 16 * row + lane // 4 + 8 * (j // 4)


def encode(weights: Tensor, seed: int = 0) -> Parts:
    """The parts of a matrix [O, I]; sides are padded to multiples of 128."""
    rows, columns = (-(-side // 128) * 128 for side in weights.shape[::-1])
    whole = torch.zeros(rows, columns)
    whole[: weights.shape[1], : weights.shape[0]] = weights.T
    g = torch.Generator().manual_seed(seed)
    suh, svh = (torch.randint(0, 2, (n,), generator=g) * 2.0 - 1 for n in (rows, columns))
    svh = (svh * whole.square().mean().sqrt().clamp(min=1e-4) * 1.2).half().float()
    h = trellis.hadamard(torch.device("cpu"))
    inner = (h @ (whole * suh[:, None] / svh).view(-1, 128, columns)).view(rows, -1, 128) @ h
    tiles = inner.view(rows // 16, 16, columns // 16, 16).transpose(1, 2).reshape(-1, 256)[:, _lanes()]
    codes = stream(tiles).view(-1, 64, 4).flip(-1)  # the first byte is the highest of its word
    packed = codes.contiguous().view(torch.int16).view(rows // 16, columns // 16, 128)
    return {"trellis": packed, "suh": suh.half(), "svh": svh.half(), "mul1": MUL1.clone()}


def stream(tiles: Tensor) -> Tensor:
    """[n, 256] bytes of targets in the order of the stream; the ring closes at a last byte 0."""
    fine = ((tiles + 4) * (FINE / 8)).long().clamp(0, FINE - 1)
    codes = torch.zeros(tiles.shape, dtype=torch.int64)
    before = codes[:, 255]
    for t in range(254):
        before = codes[:, t] = _nearest()[before, fine[:, t]]
    last = (_book()[before] - tiles[:, 254, None]).square() + (_book()[:, 0] - tiles[:, 255, None]).square()
    codes[:, 254] = last.argmin(-1)
    return codes.to(torch.uint8)


def write_exl3(model: Path, out: Path, made: Encode = lambda name, values: encode(values)) -> Path:
    """A folder as exllamav3 converts one: matrices and head by `made`, the rest float16, no bias of the router."""
    source: Source = open_source(model)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: Parts = {}
    for name in _names(source):
        values, stem = source.read(name), name.removesuffix(".weight")
        quantizable = values.dim() == 2 and not name.endswith(("embed_tokens.weight", ".gate.weight"))
        parts = made(stem, values) if quantizable else None
        tensors |= {name: values.half()} if parts is None else {f"{stem}.{k}": v for k, v in parts.items()}
    config = json.loads((out / "config.json").read_text())
    original = config.pop("quantization_config", None)
    more = {"original_quantization_config": original} if original else {}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG | more}))
    save_file(tensors, out / "model.safetensors")
    source.close()
    return out


def _names(source: Source) -> list[str]:
    from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes

    g = source.geometry
    names = list(global_shapes(g))
    for layer in range(g.layers):
        names += [name for name, _ in plain_shapes(g, layer) if not name.endswith("correction_bias")]
        names += [f"{name}.weight" for name, _ in matrix_shapes(g, layer)]
    return names
