"""llm-compressor itself writes the golden files that our folders are compared with (make test-peers).

tests/convert/test_golden_formats.py compares our writers with files in tests/data/golden; here it is shown that those
files are, to the bit, what llm-compressor makes of the same weights today.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ct_reader import tensors_of

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
