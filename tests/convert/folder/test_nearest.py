"""Folders in any format of the table: the same bytes as the INT4 variant where both write one."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.paths import GOLDEN
from mmquant.convert.folder.nearest import NearestVariant
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.formats.table import choices
from mmquant.convert.open import open_native
from mmquant.runs.folder import write_folder


@pytest.mark.parametrize("word", ["compressed-tensors", "awq"])
def test_int4_is_the_int4_variants(tmp_path: Path, word: str) -> None:
    source, row = open_native(GOLDEN / "source-bf16"), choices("int4")[word]
    any_format = write_folder(source, NearestVariant(row, 64), tmp_path / "any")
    int4 = write_folder(source, WeightsVariant(64, layout=word, symmetric=row.symmetric[0]), tmp_path / "int4")
    for file in ("config.json", "model-00001-of-00001.safetensors"):
        assert (any_format / file).read_bytes() == (int4 / file).read_bytes()
