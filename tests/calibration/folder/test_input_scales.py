"""The scales of FP4 activations: one for what gate and up see, one for each expert's down, as rescaled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from mmquant.calibration.folder.layer import QuantizedLayer
from mmquant.calibration.folder.variant import HEADROOM, input_scales
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.convert.formats import nvfp4
from mmquant.convert.models.minimax_m2.names import NAMES


def test_a_rescaled_experts_down_sees_smaller_inputs() -> None:
    entering, between = (SimpleNamespace(amax=torch.tensor(v)) for v in ([3.0, 5.0, 1.0], [8.0, 64.0, 0.0]))
    seen = cast("LayerStatistics", SimpleNamespace(layer=7, expert_in=entering, expert_mid=between))
    solved = SimpleNamespace(mid_power=torch.tensor([0, 3, 0]), experts={"gate": None}, attention={})
    found = input_scales(NAMES, nvfp4.FORMAT, seen, cast("QuantizedLayer", solved))
    # Expert 1 was rescaled by 2^-3: 64 is 8 now. Expert 2 saw nothing and has the largest of the others.
    largest = {"w1": [5.0] * 3, "w3": [5.0] * 3, "w2": [8.0, 8.0, 8.0]}
    for projection, inputs in largest.items():
        for expert, value in enumerate(inputs):
            name = f"model.layers.7.block_sparse_moe.experts.{expert}.{projection}.input_global_scale"
            assert found.pop(name).item() == pytest.approx(448 * 6 / (HEADROOM * value))
    assert not found
