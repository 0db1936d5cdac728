"""Write a GGUF file of the full geometry whose data is a hole: real header, real size, almost no disk.

llama.cpp opens it with `no_alloc` and says what weights, cache and compute buffers it would need.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmquant.convert.gguf.metadata import Metadata, Value
from mmquant.convert.gguf.mixes import find_mix, tensor_types
from mmquant.convert.gguf.names import all_shapes
from mmquant.convert.gguf.writer import TensorInfo, plan_parts
from mmquant.convert.models.geometry import Geometry
from mmquant.convert.models.gguf import architecture_keys
from mmquant.runs.evaluation.llamacpp import load_library

GGML_TYPES = {"f16": 1, "q8_0": 8}
KV = re.compile(r"llama_kv_cache: size = *([\d.]+) MiB")
COMPUTE = re.compile(r"compute buffer size = *([\d.]+) MiB")


def metadata(g: Geometry) -> Metadata:
    """The keys without which llama.cpp builds no graph; no vocabulary."""
    arch = g.architecture.gguf.arch
    head = {"general.architecture": Value("str", arch), "tokenizer.ggml.model": Value("str", "no_vocab")}
    keys = {key: Value(kind, value) for key, (kind, value) in architecture_keys(g).items()}
    return head | keys | {f"{arch}.vocab_size": Value("u32", g.vocab)}


def write_sparse(folder: Path, g: Geometry, type: str) -> Path:
    """TYPE.gguf with every tensor of the mix as `mmquant gguf --type` lays it out, as one sparse file."""
    types = tensor_types(find_mix(type), g)
    tensors = tuple(TensorInfo(name, shape, types[name]) for name, shape in all_shapes(g).items())
    (part,) = plan_parts(type, metadata(g), tensors, 1 << 60)
    path = folder / part.name
    with path.open("wb") as file:
        file.write(part.header)
        file.truncate(part.bytes)
    return path


def reported(path: Path, asks: Sequence[tuple[int, int, str]]) -> list[dict[str, float]]:
    """What llama.cpp says (MiB of model, KV, compute) for each (context, micro-batch, cache type); all unallocated.

    In a process of its own: the library's log goes through one callback.
    """
    line = [sys.executable, "-m", "helpers.sparse_gguf", str(path), json.dumps(list(asks))]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout)


def _report(path: str, asks: list[tuple[int, int, str]]) -> list[dict[str, float]]:
    lib, lines = load_library(), []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, user: lines.append(text.decode(errors="replace"))
    )
    lib.llama_log_set(callback, None)
    params = lib.llama_model_default_params()
    params.no_alloc, params.use_extra_bufts, params.load_mode = True, False, 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    assert model, "".join(lines)
    size, answers = lib.llama_model_size(model) / (1 << 20), []
    for context, batch, cache in asks:
        lines.clear()
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, max(batch, 2048), batch
        settings.flash_attn_type, settings.type_k, settings.type_v = 1, GGML_TYPES[cache], GGML_TYPES[cache]
        made = lib.llama_init_from_model(model, settings)
        assert made, "".join(lines)
        text = "".join(lines)
        kv, compute = KV.findall(text), COMPUTE.findall(text)
        answers.append({"model": size, "kv": sum(map(float, kv)), "compute": sum(map(float, compute))})
        lib.llama_free(made)
    return answers


if __name__ == "__main__":
    print(json.dumps(_report(sys.argv[1], json.loads(sys.argv[2]))))
