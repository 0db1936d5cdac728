"""AutoAWQ 0.2.9's dequantization of our folders and AutoRound's equals our decoder's (make test-peers)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.ct_reader import tensors_of
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.open import open_native, open_source
from mmquant.runs.folder import write_folder

HERE = Path(__file__).parent
READER = HERE.parents[1] / ".peers" / "autoawq" / "autoawq-0.2.9" / "awq" / "utils" / "packing_utils.py"
GOLDEN = HERE.parent / "data" / "golden"
THEIRS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def dequantize() -> Callable[..., Tensor]:
    """AutoAWQ's dequantize_gemm: (qweight, qzeros, scales, bits, group size) -> [in, out]."""
    if not READER.exists():
        pytest.fail(f"{READER} is missing; `make test-peers` fetches it")
    spec = spec_from_file_location("packing_utils", READER)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dequantize_gemm


def same(folder: Path, dequantize: Callable[..., Tensor], group_size: int) -> int:
    """Matrices of a folder that AutoAWQ and our decoder agree on, all of them bit by bit."""
    stored, ours = tensors_of(folder), open_source(folder)
    names = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    for name in names:
        words, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        wanted = dequantize(words, zeros, scales.float(), 4, group_size).T
        release = name
        for mine, alias in THEIRS.items():
            release = release.replace(f".{alias}", f".{mine}")
        assert torch.equal(ours.read(f"{release}.weight"), wanted), name
    return len(names)


def test_autorounds_folder(dequantize: Callable[..., Tensor]) -> None:
    assert same(GOLDEN / "peer-autoround-awq-g128", dequantize, 128) == 16


@pytest.mark.parametrize("group_size", [32, 128])
def test_our_folder(dequantize: Callable[..., Tensor], group_size: int, tmp_path: Path) -> None:
    variant = WeightsVariant(group_size=group_size, attention="int4", layout="awq", symmetric=False)
    folder = write_folder(open_native(GOLDEN / "source-bf16"), variant, tmp_path / "out")
    assert same(folder, dequantize, group_size) == 16
