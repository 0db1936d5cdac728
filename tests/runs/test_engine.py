"""The loop that writes artifacts: how threads share the interpreter with it."""

from __future__ import annotations

import sys

import pytest
import torch

from mmquant.runs import engine


@pytest.mark.parametrize("gpu", [True, False])
def test_turns_are_short_beside_a_gpu_and_as_before_behind(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = sys.getswitchinterval()
    inside = list[float]()

    def fail() -> None:
        with engine.handing_over():
            inside.append(sys.getswitchinterval())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [pytest.approx(engine.TURN if gpu else before)]
    assert sys.getswitchinterval() == before
