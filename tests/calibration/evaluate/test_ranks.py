"""Two and three gloo processes give one process's numbers; a dead process ends a run that can go on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.calibration_cases import exit_codes, ranks
from helpers.eval_cases import Noisy, make_sample, one_rank, packed, small, write_model
from mmquant.calibration.evaluate.streamed import evaluate
from mmquant.convert.open import open_native


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_one_process_numbers(tmp_path: Path, world: int) -> None:
    model = open_native(write_model(tmp_path))
    ranks(world, partial(one_rank, tmp_path, "store"))
    found = torch.load(tmp_path / "store.pt")
    alone = packed(evaluate(model, [Noisy(model)], make_sample(), small())[0])
    for name in ("nll", "kld", "shift", "layers"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(found["same"], alone["same"])
    if world == 2:
        ranks(3, partial(one_rank, tmp_path, "read"))
        read = torch.load(tmp_path / "read.pt")
        torch.testing.assert_close(read["kld"], alone["kld"], rtol=0, atol=1e-4)


def test_a_dying_rank_ends_the_run_with_its_message(tmp_path: Path) -> None:
    model = open_native(write_model(tmp_path))
    assert all(exit_codes(2, partial(one_rank, tmp_path, "die")))
    assert "noisy: layer 2 cannot be read" in (tmp_path / "died-1").read_text()
    assert sorted(p.name.split("-", 1)[1] for p in (tmp_path / "state").glob("*.safetensors")) == [
        "layer002-rank0.safetensors",
        "layer002-rank1.safetensors",
    ]
    ranks(2, partial(one_rank, tmp_path, "resume"))
    found = torch.load(tmp_path / "resume.pt")
    assert set(found["layers_read"].tolist()) == {2}
    alone = packed(evaluate(model, [Noisy(model)], make_sample(), small())[0])
    torch.testing.assert_close(found["kld"], alone["kld"], rtol=1e-4, atol=1e-6)
