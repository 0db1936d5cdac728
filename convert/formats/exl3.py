"""EXL3, exllamav3's format, read only: a trellis with one to eight bits a weight, chosen matrix by matrix.

`trellis` I16 [I/16, O/16, 16 K], `suh` F16 [I], `svh` F16 [O] (signs times scales), sides padded with zeros to
multiples of 128. A marker names the codebook: `mul1` or `mcg` I32 [] that holds its multiplier, none for the first one
(3inst). K is an integer up to 8, with mul1 1.5, 2.5 and 3.5 too. Everything follows from the tensors; the bits and the
codebook that config.json says are the conversion's, and a matrix without a trellis is plain. The head may be
quantized, embeddings and routers are not. Source: exllamav3 1.6.5 (modules/quant/exl3.py, conversion/compile.py);
folders since 0.0.1 have these tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...quantize import trellis
from .format import Fetch, Format, Found, Method, Part, PartError, Scheme, Shape
from .scales import finite
from .skip_lists import EXLLAMAV3

NAME = "exl3"
PLAIN_BOOK = "3inst"  # the codebook without a marker
HALF = "mul1-half"  # K = bits + 1/2
"""Kinds are the codebooks, of which mul1 stands twice."""


def _padded(side: int) -> int:
    return -(-side // trellis.BLOCK) * trellis.BLOCK


def _marker(kind: str) -> str | None:
    """The tensor that names the codebook."""
    return None if kind == PLAIN_BOOK else kind.partition("-")[0]


def _words(kind: str, bits: int) -> int:
    """16-bit words of a tile."""
    return 16 * bits + (8 if kind == HALF else 0)


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    outputs, inputs = map(_padded, shape)
    tiles = (inputs // trellis.SIDE, outputs // trellis.SIDE)
    found = [
        Part("trellis", (*tiles, _words(scheme.format.kind, scheme.bits)), ("I16",)),
        Part("suh", (inputs,), ("F16",)),
        Part("svh", (outputs,), ("F16",)),
    ]
    marker = _marker(scheme.format.kind)
    return [*found, Part(marker, (), ("I32",))] if marker else found


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    """Matrix by matrix: a stack's codes and transforms would take several times its values."""
    marker, kind = _marker(scheme.format.kind), scheme.format.kind.partition("-")[0]
    if marker:
        said = fetch(marker).to(torch.int64) & 0xFFFFFFFF
        if bool((wrong := said != trellis.MULTIPLIERS[kind]).any()):
            raise PartError(marker, f"is {int(said[wrong][0]):#x}, expected {trellis.MULTIPLIERS[kind]:#x}")
    suh, svh, codes = finite(fetch, "suh"), finite(fetch, "svh"), fetch("trellis")
    lead, (outputs, inputs) = codes.shape[:-3], shape
    out = torch.empty((*lead, *shape), device=codes.device)
    each = (codes.reshape(-1, *codes.shape[-3:]), suh.reshape(-1, suh.shape[-1]), svh.reshape(-1, svh.shape[-1]))
    for values, code, left, right in zip(out.view(-1, *shape), *each, strict=True):
        values.copy_(trellis.matrix(code, left, right, kind)[:outputs, :inputs])
    return out


def _read(formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str) -> Scheme:
    """What is expected of a matrix whose tensors are no EXL3."""
    del quantization, names, engine
    return Scheme(formats[0], formats[0].bits[0])


def _derive(formats: Sequence[Format], parts: Found, shape: Shape) -> Scheme | None:
    del shape
    if "trellis" not in parts:
        return None
    markers = [marker for row in formats if (marker := _marker(row.kind)) in parts and row.kind != HALF]
    if len(markers) > 1:
        raise PartError(str(markers[1]), f"is there beside {markers[0]}, expected one codebook")
    found = parts["trellis"][1]
    for row in (row for row in formats if _marker(row.kind) == (markers[0] if markers else None)):
        for bits in row.bits:
            if len(found) == 3 and found[2] == _words(row.kind, bits):
                return Scheme(row, bits)
    expected = "1 to 8, or 1.5, 2.5, 3.5" if markers == ["mul1"] else "1 to 8"
    raise PartError("trellis", f"has shape {list(found)}, expected [inputs / 16, outputs / 16, 16 K] with K {expected}")


METHOD = Method(
    (NAME,),
    _read,
    engines=(EXLLAMAV3,),
    outside=True,
    named=lambda quantization, name: False,
    derive=_derive,
    left_out=("router_bias",),
)
FORMATS = tuple(
    Format(
        f"{NAME}-{kind}",
        METHOD,
        (1, 2, 3) if kind == HALF else (4, 1, 2, 3, 5, 6, 7, 8),
        _parts,
        _unpack,
        kind=kind,
        label="EXL3-{bits}" + (".5" if kind == HALF else "") + "bpw",
        manifest=NAME,
    )
    for kind in ("mul1", HALF, "mcg", PLAIN_BOOK)
)
