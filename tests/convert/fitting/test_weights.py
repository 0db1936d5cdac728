"""Bytes from config.json alone equal what is published and what dry runs of a whole checkpoint said."""

from __future__ import annotations

import pytest

from helpers.m27 import M27
from mmquant.convert.fitting.catalog import find_rows, rows
from mmquant.convert.fitting.weights import Weights
from mmquant.errors import InputError


def test_parameters_of_m27() -> None:
    assert (M27.parameters, M27.active_parameters) == (228_689_764_864, 10_415_128_064)


@pytest.mark.parametrize(
    ("type", "size"),
    [
        ("fp8-native", 230_121_630_720),  # published for M2, whose geometry this is
        ("fp8-block", 230_121_630_720),
        ("int4-g128", 123_967_758_336),  # a dry run over a sparse checkpoint of this geometry
    ],
)
def test_known_bytes_of_folders(type: str, size: int) -> None:
    assert find_rows(type)[0].weigh(M27).total == size


@pytest.mark.parametrize(
    ("type", "mib"),
    [("Q2_K", 79436), ("Q3_K_M", 104202), ("Q4_K_M", 131926), ("IQ4_XS", 116226), ("IQ2_S", 64877), ("Q8_0", 231865)],
)
def test_known_bytes_of_mixes(type: str, mib: int) -> None:
    """What llama-quantize's dry run printed for this geometry."""
    assert abs(find_rows(type)[0].weigh(M27).total / (1 << 20) - mib) < 1


def test_a_type_is_found_by_name_family_and_first_word() -> None:
    assert [row.id for row in find_rows("iq3_xxs")] == ["IQ3_XXS"]
    assert [row.id for row in find_rows("Q4_K")] == ["Q4_K_M"]
    assert {row.family for row in find_rows("gguf")} == {"gguf"}
    assert all(row.id.startswith("int4") for row in find_rows("int4"))
    with pytest.raises(InputError, match="--type Q4_KM: unknown, did you mean Q4_K_M"):
        find_rows("Q4_KM")
    with pytest.raises(
        InputError, match=r"--type Q9: unknown, expected one that `mmquant fit` lists, or fp8, .*, mlx, gguf$"
    ):
        find_rows("Q9")


def test_rows_have_names_of_their_own() -> None:
    ids = [row.id.lower() for row in rows()]
    assert len(ids) == len(set(ids))


def test_weights_add_up() -> None:
    weights = Weights(10, (1, 2, 3), 4, 5)
    assert (weights.experts, weights.total) == (6, 16)
