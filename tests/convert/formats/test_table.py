"""Storage formats are told apart by the table: no comparison with their names elsewhere, and each row is whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import click
import pytest
import torch

from helpers.paths import SOURCE
from mmquant.commands import fp8, int4, mlx, mxfp4, nvfp4
from mmquant.convert.folder.writer import DTYPE_NAMES
from mmquant.convert.formats.format import FLOATS, Format, Scheme, check_writable, specs
from mmquant.convert.formats.table import FORMATS, METHODS, choices, formats_of
from mmquant.convert.models.minimax_m2.names import NAMES as TENSORS
from mmquant.errors import InputError

PACKAGES = ("mmquant", "commands", "runs", "calibration", "convert")
# Words of other things too: tiles, an FP8 KV cache, commands.
GENERAL = {"safetensors", "block", "channel", "fp8"} | {row.command for row in FORMATS}
NAMES = {word for row in FORMATS for word in (row.name, *row.method.names, row.manifest, row.choice) if word} - GENERAL


def constants(node: ast.expr) -> Iterator[object]:
    if isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        for element in node.elts:
            yield from constants(element)


def comparisons(tree: ast.AST) -> Iterator[ast.Compare]:
    """Comparisons with a format's name; `method` (GPTQ or AWQ, how codes are found) is no format."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(value in NAMES for side in sides for value in constants(side) if isinstance(value, str))
            if named and not any("method" in ast.unparse(side) for side in sides):
                yield node


def test_no_format_is_told_apart_by_its_name_elsewhere() -> None:
    found = []
    for path in (path for package in PACKAGES for path in (SOURCE / package).rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        if not where.startswith(("convert/formats/", "mmquant/data/")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [f"{where}:{node.lineno}: {ast.unparse(node)}" for node in comparisons(tree)]
    assert not found


def test_the_search_for_comparisons_finds_them() -> None:
    seen = ['layout == "awq"', 'kind in ("pack-quantized", "x")', 'o.method == "awq"', 'x != "awq"', 'size == "block"']
    assert [bool(list(comparisons(ast.parse(text)))) for text in seen] == [True, True, False, True, False]


def words_of(command: click.Command, option: str) -> tuple[tuple[str, ...], Any]:
    found = next(p for p in command.params if f"--{option}" in p.opts)
    assert isinstance(found.type, click.Choice)
    return tuple(found.type.choices), found.default


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [
        (fp8.command, "fp8", "scheme"),
        (int4.command, "int4", "format"),
        (nvfp4.command, "nvfp4", "format"),
        (mxfp4.command, "mxfp4", "format"),
        (mlx.command, "mlx", "mode"),
    ],
)
def test_commands_offer_what_the_table_has(command: click.Command, name: str, option: str) -> None:
    words, default = words_of(command, option)
    assert words == tuple(choices(name))
    assert default == words[0]


def test_rows_are_told_apart() -> None:
    assert len({(row.name, row.strategies, row.method) for row in FORMATS}) == len(FORMATS)
    written = [(row.command, row.choice) for row in FORMATS if row.command]
    assert len(set(written)) == len(written)
    assert len(METHODS) == len({name for row in FORMATS for name in row.method.names})
    assert {row for method in METHODS.values() for row in formats_of(method)} == set(FORMATS)


def scheme_of(row: Format, symmetric: bool) -> Scheme:
    group = (row.group_sizes or (64,))[0]
    return Scheme(row, row.bits[0], -1 if row.requantizable else group, symmetric, (128, 128) if row.tiled else None)


WRITTEN = [(row, symmetric) for row in FORMATS if row.nearest is not None for symmetric in row.symmetric]


@pytest.mark.parametrize(("row", "symmetric"), WRITTEN, ids=lambda value: str(getattr(value, "name", value)))
@pytest.mark.parametrize("shape", [(64, 128), (128, 192), (8, 384)])
def test_written_as_planned_and_read_back(row: Format, symmetric: bool, shape: tuple[int, int]) -> None:
    """What rounding writes has the planned names, shapes and dtypes; reading gives the weights within a coarse grid."""
    scheme = scheme_of(row, symmetric)
    check_writable(scheme)
    weights = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 0.02
    assert row.nearest is not None
    packed = row.nearest(["a", "b", "c"], weights, scheme)
    planned = {spec.name: (spec.dtype, spec.shape) for spec in specs(scheme, "m", shape)}
    assert {f"m.{suffix}": (DTYPE_NAMES[v.dtype], tuple(v.shape[1:])) for suffix, v in packed.items()} == planned
    values = row.unpack(scheme, shape, lambda suffix: packed[suffix])
    assert values.dtype == torch.float32
    assert values.shape == weights.shape
    assert float((values - weights).norm() / weights.norm()) < 0.16
    for index in range(3):  # one by one as together
        alone = row.unpack(scheme, shape, lambda suffix, index=index: packed[suffix][index])
        assert torch.equal(alone, values[index])


@pytest.mark.parametrize("row", [row for row in FORMATS if row.group is not None], ids=lambda row: row.choice)
def test_what_config_says_is_recognised(row: Format) -> None:
    scheme = scheme_of(row, row.symmetric[0])
    assert row.config is not None
    config = row.config(scheme, True, TENSORS)
    name = "model.layers.0.self_attn.q_proj"
    found = row.method.read(formats_of(row.method), config, (name,), "vLLM")
    assert found == scheme
    assert row.method.read(formats_of(row.method), row.config(scheme, False, TENSORS), (name,), "vLLM") is None


def test_what_a_format_cannot_hold_is_refused() -> None:
    gptq = choices("int4")["gptq"]
    with pytest.raises(InputError, match="format gptq: asymmetric, expected symmetric"):
        check_writable(Scheme(gptq, 4, 128, symmetric=False))
    with pytest.raises(InputError, match="format awq: 8 bits, expected 4"):
        check_writable(Scheme(choices("int4")["awq"], 8, 128, symmetric=False))
    with pytest.raises(InputError, match="m: 12 x 64, expected multiples of 8 for format gptq"):
        specs(Scheme(gptq, 4, 64), "m", (12, 64))
    block = choices("fp8")["block"]
    carried = specs(Scheme(block, 8, block=(128, 128)), "m", (130, 128), "F32")
    assert [(s.dtype, s.shape) for s in carried] == [("F8_E4M3", (130, 128)), ("F32", (2, 1))]
    assert FLOATS[0] == "BF16"
