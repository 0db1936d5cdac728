"""FP8 that is carried is read by several threads; order, errors and stages are as of one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.folder import fp8
from mmquant.convert.folder.fp8 import Fp8Variant
from mmquant.convert.models.shapes import matrix_shapes
from mmquant.errors import InputError
from mmquant.stages import Stages, timing

BLOCK = Fp8Variant("block")


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_a_layer_is_in_the_files_order_and_its_own(shards: int, tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path, shards))
    found = BLOCK.layer(source, 1, "cpu")
    assert sorted(found) == sorted(spec.name for spec in BLOCK.specs(source, 1))
    for name, _ in matrix_shapes(source.geometry, 1):
        codes, scales = source.native(name)
        assert torch.equal(found[name + ".weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found[name + ".weight_scale"], scales)
    matrices = [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]
    assert matrices == [name for name, _ in matrix_shapes(source.geometry, 1)]


def test_a_fault_in_a_thread_is_told_and_no_thread_stays(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path, 1))
    name = list(matrix_shapes(source.geometry, 1))[7][0] + ".weight"
    info = source.tensors[name]
    with open(tmp_path / info.shard, "r+b") as file:
        file.seek(info.offset + 5)
        file.write(b"\x7f")
    before = threading.active_count()
    with pytest.raises(InputError, match=rf"{name} holds NaN or infinity, first at \[0, 5\]"):
        BLOCK.layer(source, 1, "cpu")
    source.schedule.ahead.join()
    assert threading.active_count() <= before


def test_waiting_for_threads_counts_as_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = Checkpoint.native

    def slow(source: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        return native(source, name)

    monkeypatch.setattr(Checkpoint, "native", slow)
    with timing(stages := Stages()):
        BLOCK.layer(open_checkpoint(write_tiny(tmp_path, 1)), 1, "cpu")
    assert stages.take()["read"] >= 0.1


def test_what_is_computed_is_computed_in_the_callers_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own has another current GPU, and no stages."""
    source, nearest = open_checkpoint(write_tiny(tmp_path, 1, quantization_config=None)), fp8.nearest_tensors
    seen = set[threading.Thread]()

    def spy(*arguments: object) -> dict[str, Tensor]:
        seen.add(threading.current_thread())
        return nearest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8, "nearest_tensors", spy)
    BLOCK.layer(source, 1, "cpu")
    assert seen == {threading.current_thread()}
