"""A process that holds itself to a share of a GPU, as far as that can be seen without one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from mmquant.calibration.model.gpu import at_most


@pytest.mark.parametrize(("size", "share"), [(20, 0.25), (80, 1.0), (200, 1.0)])
def test_the_share_is_set_and_given_back(size: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: shares.append(given))
    with contextlib.suppress(KeyError), at_most("cuda:1", size):
        assert shares == [(share, "cuda:1")]
        raise KeyError
    assert shares == [(share, "cuda:1"), (1.0, "cuda:1")]


@pytest.mark.parametrize(("device", "size"), [("cpu", 20), ("cuda", None)])
def test_nothing_is_set_where_nothing_is_asked(device: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: pytest.fail(str(given)))
    with at_most(device, size):
        pass
