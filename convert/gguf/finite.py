"""Find NaN and infinity in GGUF tensors: in float16 block scales, or in the values themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

from ...quantize.ggml.types import GGMLType

SCALES = {  # type -> byte offsets of the float16 scales of a block; source: ggml-common.h
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ3_S": (0,), "IQ3_XXS": (0,),
    "IQ2_S": (0,), "IQ2_XS": (0,), "IQ2_XXS": (0,), "IQ1_S": (0,),
}  # fmt: skip
_VALUES = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
IQ1_M_SCALES = 48  # offset of 4 words, whose top nibbles make up the one float16 scale
MXFP4_LARGEST = 252  # E8M0 exponent: with the largest code, 12 halves, beyond it float32 overflows
AT_ONCE = 1 << 16  # blocks


def check_stored(data: NDArray[np.uint8], kind: GGMLType, where: str) -> None:
    """InputError when a tensor's bytes hold NaN or infinity; `where`: its file and name."""
    if kind.name in _VALUES:
        view, mask = _VALUES[kind.name]
        flat = data.reshape(-1).view(view)
        step = AT_ONCE * 32
        bad = next((s for s in range(0, len(flat), step) if ((flat[s : s + step] & mask) == mask).any()), None)
    else:
        blocks = data.reshape(-1, kind.block_bytes)
        bad = next((s for s in range(0, len(blocks), AT_ONCE) if _bad_blocks(blocks[s : s + AT_ONCE], kind)), None)
    if bad is not None:
        raise InputError(f"{where} holds NaN or infinity as {kind.name}; expected finite values")


def _bad_blocks(blocks: NDArray[np.uint8], kind: GGMLType) -> bool:
    if kind is GGMLType.MXFP4:
        return bool((blocks[:, 0] > MXFP4_LARGEST).any())
    if kind is GGMLType.IQ1_M:
        words = np.ascontiguousarray(blocks[:, IQ1_M_SCALES : IQ1_M_SCALES + 8]).view(np.uint16)
        return bool(((words[:, 3] & 0x7000 == 0x7000) & (words[:, 2] & 0xC000 == 0xC000)).any())
    # The exponent of a float16 lies in its second byte; all five bits set is NaN or infinity.
    return any(bool((blocks[:, offset + 1] & 0x7C == 0x7C).any()) for offset in SCALES[kind.name])
