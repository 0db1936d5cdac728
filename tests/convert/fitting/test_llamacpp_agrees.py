"""The real llama.cpp is given a header-only file of the full geometry: its own report equals our arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import llamacpp
from helpers.m27 import M27, PRUNED
from helpers.sparse_gguf import reported, write_sparse
from mmquant.convert.fitting import memory
from mmquant.convert.fitting.catalog import find_rows
from mmquant.convert.models.geometry import Geometry

MIB = 1 << 20
ASKS = [(512, 512, "f16"), (32768, 512, "f16"), (65536, 512, "q8_0"), (196608, 512, "f16"), (32768, 2048, "f16")]


def check(g: Geometry, type: str, folder: Path, asks: list[tuple[int, int, str]]) -> None:
    llamacpp.need()
    size = find_rows(type)[0].weigh(g).total
    for (context, ubatch, cache), found in zip(asks, reported(write_sparse(folder, g, type), asks), strict=True):
        assert abs(size / MIB - found["model"]) < 1
        assert abs(memory.kv_bytes(g, context, cache) / MIB - found["kv"]) < 1
        ours = memory.compute_bytes(g, context, ubatch) / MIB
        assert abs(ours - found["compute"]) < 0.05 * found["compute"], (context, ubatch, ours, found)


def test_iq3_xxs_as_llama_cpp_reports_it(tmp_path: Path) -> None:
    check(M27, "IQ3_XXS", tmp_path, ASKS[1:3])


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q4_K_M", "IQ4_XS", "Q2_K", "IQ2_S", "Q8_0", "MXFP4_MOE"])
def test_types_and_contexts_as_llama_cpp_reports_them(type: str, tmp_path: Path) -> None:
    check(M27, type, tmp_path, ASKS)


@pytest.mark.slow
def test_a_pruned_model_as_llama_cpp_reports_it(tmp_path: Path) -> None:
    check(PRUNED, "Q4_K_M", tmp_path, ASKS)
