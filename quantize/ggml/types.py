"""The ggml tensor types that mmquant reads and writes: ids, block sizes and fallbacks.

Source: ggml.h and ggml-common.h of llama.cpp (type numbers and block structs), llama-quant.cpp (fallbacks).
"""

from __future__ import annotations

from enum import IntEnum

from mmquant.errors import InputError


class GGMLType(IntEnum):
    """A tensor type; the value is the number stored in a GGUF file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    MXFP4 = 39

    @property
    def block_columns(self) -> int:
        """Columns that one block holds."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _BLOCKS[self][1]

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` is a whole number of blocks."""
        return columns % self.block_columns == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; ValueError when the row is not a whole number of blocks."""
        if not self.fits(columns):
            raise InputError(f"{self.name}: rows of {columns} columns, expected a multiple of {self.block_columns}")
        return columns // self.block_columns * self.block_bytes


# columns of a block, bytes of a block
_BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.MXFP4: (32, 17),
}

# What llama-quantize stores when a row is not a multiple of 256 columns.
FALLBACK: dict[GGMLType, GGMLType] = {
    GGMLType.IQ1_S: GGMLType.IQ4_NL,
    GGMLType.IQ1_M: GGMLType.IQ4_NL,
    GGMLType.IQ2_XXS: GGMLType.IQ4_NL,
    GGMLType.IQ2_XS: GGMLType.IQ4_NL,
    GGMLType.IQ2_S: GGMLType.IQ4_NL,
    GGMLType.IQ3_XXS: GGMLType.IQ4_NL,
    GGMLType.IQ3_S: GGMLType.IQ4_NL,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


def storable(kind: GGMLType, columns: int) -> GGMLType:
    """`kind` itself when rows of `columns` are whole blocks of it, otherwise llama-quantize's fallback, at last F16."""
    if kind.fits(columns):
        return kind
    fallback = FALLBACK.get(kind, GGMLType.F16)
    return fallback if fallback.fits(columns) else GGMLType.F16
