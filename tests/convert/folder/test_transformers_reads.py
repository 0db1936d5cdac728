"""transformers loads our folders with the same weights as compressed-tensors.

transformers 5.23 is a valid reader of FP8 per channel, symmetric INT4 and native FP8. It cannot read FP8 tiles of
experts (its conversion fails on the peers' folder as on ours) nor asymmetric INT4; those have other readers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.ct_reader import dequantized
from helpers.paths import GOLDEN
from mmquant.calibration.folder.variant import CalibratedWeights
from mmquant.calibration.statistics.live import LivePass
from mmquant.calibration.text.corpus import Corpus
from mmquant.convert.folder.fp8 import Fp8Variant
from mmquant.convert.folder.variant import FolderVariant
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.open import open_native
from mmquant.runs.folder import write_folder
from mmquant.runs.native import write_native

VARIANTS: dict[str, FolderVariant] = {
    "channel": Fp8Variant("channel"),
    "int4 everywhere": WeightsVariant(128, "int4"),
    "int4 experts, g32": WeightsVariant(32, "bf16"),
}


def load(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it, weights in float32; its progress bars and warnings are not ours."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def expert_weights(model: torch.nn.Module, layer: int) -> dict[str, Tensor]:
    """transformers' fused experts under the release's names: gate_up_proj = [w1; w3], down_proj = w2."""
    state = model.state_dict()
    prefix = f"model.layers.{layer}.mlp.experts."
    fused, down = state[prefix + "gate_up_proj"].float(), state[prefix + "down_proj"].float()
    weights: dict[str, Tensor] = {}
    for expert in range(fused.shape[0]):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        w1, w3 = fused[expert].chunk(2)
        weights |= {name + "w1.weight": w1, name + "w3.weight": w3, name + "w2.weight": down[expert]}
    return weights


@pytest.mark.parametrize("name", VARIANTS)
def test_experts_are_loaded_as_written(name: str, tmp_path: Path) -> None:
    folder = write_folder(open_native(GOLDEN / "source-bf16"), VARIANTS[name], tmp_path / "out")
    expected, loaded = dequantized(folder), expert_weights(load(folder), layer=0)
    assert set(loaded) == {n for n in expected if ".experts." in n}
    for weight, values in loaded.items():
        # It computes in the scales' dtype: one rounding to bfloat16 at most.
        assert torch.allclose(values, expected[weight], rtol=2**-8, atol=0), weight


def test_scales_of_an_fp8_cache_disturb_nothing(tmp_path: Path) -> None:
    source = open_native(GOLDEN / "source-bf16")
    tokens = torch.randint(0, source.geometry.vocab, (4, 32), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(tokens, torch.zeros(4, dtype=torch.int64), ("random",), {})
    variant = CalibratedWeights(128, "bf16", kv_cache="fp8", report=lambda line: None)
    folder = write_folder(source, variant, tmp_path / "out", provider=LivePass(source, corpus))
    expected, loaded = dequantized(folder), expert_weights(load(folder), layer=0)
    for weight, values in loaded.items():
        assert torch.allclose(values, expected[weight], rtol=2**-8, atol=0), weight


def test_native_fp8_is_loaded_as_written(tmp_path: Path) -> None:
    checkpoint = open_native(GOLDEN / "loads-native-fp8-block")
    loaded = expert_weights(load(write_native(checkpoint, tmp_path / "out")), layer=0)
    for name, values in loaded.items():
        assert torch.allclose(values, checkpoint.read(name), rtol=2**-8, atol=0), name
