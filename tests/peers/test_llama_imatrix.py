"""llama.cpp's own imatrix loader (`common_imatrix_load`, used by llama-quantize) reads our files.

The libraries come from npm's @node-llama-cpp/linux-x64 (`make test-peers` unpacks them): no wheel carries llama-common.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmquant.convert.gguf.imatrix import Imatrix, Importance, write_imatrix

pytestmark = pytest.mark.peers

LIBRARIES = Path(__file__).parents[2] / ".peers" / "node-llama-cpp" / "package" / "bins" / "linux-x64"
THEIRS = Path(__file__).parents[1] / "data" / "imatrix.gguf"
LOAD = "_Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix"


def load(path: Path) -> tuple[bool, int, int, int]:
    """(accepted, weights, chunk count, chunk size) by llama.cpp, through hand-made std::string and std::map."""
    for name in ("libggml-base.so", "libggml.v*.so", "libllama.v*.so"):
        ctypes.CDLL(str(next(LIBRARIES.glob(name))), mode=ctypes.RTLD_GLOBAL)
    function = getattr(ctypes.CDLL(str(LIBRARIES / "libllama-common.so")), LOAD)
    function.restype = ctypes.c_bool
    text = ctypes.create_string_buffer(str(path).encode())
    string = (ctypes.c_uint64 * 4)(ctypes.addressof(text), len(text.value), len(text.value), 0)
    out = (ctypes.c_uint64 * 64)()
    header = ctypes.addressof(out) + 8
    out[3] = out[4] = header  # an empty std::map: leftmost and rightmost are its header
    accepted = function(ctypes.byref(string), ctypes.byref(out))
    return accepted, out[5], out[9] & 0xFFFFFFFF, out[9] >> 32


def in_a_process(path: Path) -> tuple[bool, int, int, int]:
    """`load` in a process of its own: a foreign library may abort."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_llama_imatrix as t; "
    code += f"print(*t.load(t.Path({str(path)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    accepted, *numbers = done.stdout.split()
    return accepted == "True", *map(int, numbers)  # type: ignore[return-value]


def test_llama_cpp_loads_what_we_write(tmp_path: Path) -> None:
    if not LIBRARIES.is_dir():
        pytest.skip("make test-peers unpacks the libraries")
    assert in_a_process(THEIRS) == (True, 32, 200, 512)
    rng = np.random.default_rng(0)
    dead = np.array([3.0, 0.0, 2.0], np.float32)
    weights = {
        "blk.0.ffn_down_exps.weight": Importance(rng.random((3, 40), np.float32) * (dead[:, None] > 0), dead),
        "blk.0.attn_q.weight": Importance(rng.random((1, 64), np.float32), np.ones(1, np.float32)),
    }
    write_imatrix(tmp_path / "ours.gguf", Imatrix(weights, ("code", "中文"), 7, 96))
    assert in_a_process(tmp_path / "ours.gguf") == (True, 2, 7, 96)
    broken = tmp_path / "broken.gguf"
    shutil.copy(THEIRS, broken)
    broken.write_bytes(broken.read_bytes().replace(b"blk.0.attn_q.weight.counts", b"blk.0.attn_q.weight.countz"))
    assert not in_a_process(broken)[0]
