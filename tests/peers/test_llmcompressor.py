"""llm-compressor itself writes the golden files with which our folders are compared (make test-peers).

test_golden_formats.py compares our writers with files in tests/data/golden. Here it is shown that those files are, to
the bit, what llm-compressor makes of the same weights today; and what --backend llmcompressor writes is compared with
ours tensor by tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.ct_reader import tensors_of
from mmquant.convert.models.shapes import matrix_shapes
from mmquant.convert.open import open_native, open_source

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".peers" / "llmcompressor" / "bin" / "python"
GOLDEN = HERE.parent / "data" / "golden"
SCHEMES = {
    "FP8_BLOCK": "peer-llmc-mf-fp8-block",
    "FP8_DYNAMIC": "peer-llmc-mf-fp8-dynamic",
    "W4A16": "peer-llmc-mf-w4a16-g128-sym",
    "W4A16_ASYM": "peer-llmc-mf-w4a16-g128-asym",
}

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing; `make test-peers` installs it")
    folder = tmp_path_factory.mktemp("llmcompressor")
    command = [PYTHON, "-W", "ignore", HERE / "llmcompressor_write.py", GOLDEN / "source-bf16", folder, *SCHEMES]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_golden_tensors_are_its_own(written: Path, scheme: str) -> None:
    fresh, golden = tensors_of(written / scheme), tensors_of(GOLDEN / SCHEMES[scheme])
    assert set(fresh) == set(golden)
    for name, tensor in golden.items():
        assert fresh[name].dtype == tensor.dtype, name
        assert torch.equal(fresh[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_golden_config_is_its_own(written: Path, scheme: str) -> None:
    fresh = json.loads((written / scheme / "config.json").read_text())["quantization_config"]
    golden = json.loads((GOLDEN / SCHEMES[scheme] / "config.json").read_text())["quantization_config"]
    assert fresh == golden


COMMANDS = {
    "fp8": ["fp8"],
    "fp8 channel": ["fp8", "--scheme", "channel"],
    "int4": ["int4", "--method", "rtn"],
    "int4 everywhere, g32": ["int4", "--method", "rtn", "--attention", "int4", "--group-size", "32"],
}


@pytest.fixture(scope="module", params=COMMANDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The demo model by the same command, by our own code and by --backend llmcompressor, which checks its folder."""
    folder, environment = tmp_path_factory.mktemp("backend"), {**os.environ, "MMQUANT_LLMCOMPRESSOR": str(PYTHON)}
    for backend in ("mmquant", "llmcompressor"):
        words = [*COMMANDS[request.param], "--model", "demo", "--backend", backend, "--out", folder / backend]
        command = [sys.executable, "-m", "mmquant", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    return request.param, folder / "mmquant", folder / "llmcompressor"


def test_the_backend_writes_the_tensors_that_we_write(both: tuple[str, Path, Path]) -> None:
    _, mine, theirs = both
    ours, other = tensors_of(mine), tensors_of(theirs)
    assert set(ours) == set(other)
    for name, tensor in ours.items():
        assert tensor.shape == other[name].shape, name
        assert tensor.dtype == other[name].dtype or name.endswith("weight_scale"), name


def test_the_backend_is_no_closer_to_the_source_than_we_are(both: tuple[str, Path, Path]) -> None:
    """Matrix by matrix: FP8 alike (tiles are exact in ours), INT4 by absmax against ours by least squares."""
    name, mine, theirs = both
    source, ours, other = open_native("demo"), open_source(mine), open_source(theirs)
    errors: dict[str, tuple[float, float]] = {}
    for layer in range(source.geometry.layers):
        for matrix, _ in matrix_shapes(source.geometry, layer):
            truth = source.read(matrix + ".weight")
            own, his = (float((s.read(matrix + ".weight") - truth).norm() / truth.norm()) for s in (ours, other))
            errors[matrix] = own, his
    largest = 0.03 if name.startswith("fp8") else 0.16
    for matrix, (own, his) in errors.items():
        assert own <= his * 1.02 + 1e-6, matrix
        assert his < largest, matrix
