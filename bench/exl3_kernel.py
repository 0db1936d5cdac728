"""exllamav3's own kernels against our reader of its trellis, bit for bit, on random bits of every width and codebook.

    python bench/exl3_kernel.py EXLLAMAV3_EXT [--build FOLDER] [--only-build]

EXLLAMAV3_EXT is the folder exllamav3/exllamav3_ext of its wheel or checkout (its whole extension takes minutes to
compile). Its reconstruct kernels are taken from quant/reconstruct.cu as they stand, compiled by nvcc with a launcher
of our own, and called: `reconstruct` gives T in float16, `reconstruct_had` the weights, with its transforms in
float16. The table also has the time and memory that our reader takes for matrices of M2.7's size. Needs nvcc and a
CUDA device; --only-build needs nvcc alone.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import tempfile
import time
from pathlib import Path

import _path  # noqa: F401
import torch
from torch import Tensor

from mmquant.quantize import trellis

BOOKS = tuple(trellis.MULTIPLIERS)  # by exllamav3's numbers
CASES = [(bits, False, book) for book in BOOKS for bits in range(1, 9)] + [(bits, True, "mul1") for bits in (1, 2, 3)]
BLOCKS = ((8, 8), (8, 40), (56, 16), (192, 96))  # tiles down and across
CUBLAS = "SUCCESS NOT_INITIALIZED ALLOC_FAILED INVALID_VALUE ARCH_MISMATCH MAPPING_ERROR EXECUTION_FAILED "
CUBLAS += "INTERNAL_ERROR NOT_SUPPORTED LICENSE_ERROR"
HEADERS = ("util.cuh", "ptx.cuh", "quant/exl3_dq.cuh", "quant/hadamard_inner.cuh")
WANTED = ("reconstruct_tile", "reconstruct_kernel", "reconstruct_had_tile", "reconstruct_had_kernel")
# What its headers include and the kernels do not need.
STUBS = {
    "c10/util/Exception.h": "#define TORCH_CHECK(...) do {} while (0)\n",
    "cublas_v2.h": "enum cublasStatus_t { " + ", ".join(f"CUBLAS_STATUS_{name}" for name in CUBLAS.split()) + " };\n",
}
LAUNCHER = """
template <int K, int cb, bool HALF>
int launch(half* out, const uint16_t* packed, const half* suh, const half* svh, int rows, int cols) {
    if (suh) reconstruct_had_kernel<K, cb, HALF><<<dim3(cols / 8, rows / 8), 256>>>(out, packed, suh, svh, cols, 0);
    else reconstruct_kernel<K, cb, HALF><<<dim3(cols / 8, rows), 256>>>(out, packed, cols, 0);
    return (int) cudaDeviceSynchronize();
}
extern "C" int decode(int kind, half* o, const uint16_t* p, const half* u, const half* v, int rows, int cols) {
    switch (kind) { CASES }
    return -1;
}
"""


def build(source: Path, folder: Path) -> Path:
    """The shared library of exllamav3's kernels and our launcher."""
    text = (source / "quant/reconstruct.cu").read_text()
    functions = re.findall(r"^template <int K, int cb.*?^}$", text, re.DOTALL | re.MULTILINE)
    chosen = [f for f in functions if any(re.search(rf"\bvoid {name}\b", f) for name in WANTED)]
    if len(chosen) != len(WANTED):
        raise SystemExit(f"{source}: {len(chosen)} of {len(WANTED)} kernels found in quant/reconstruct.cu")
    call = "return launch<{}, {}, {}>(o, p, u, v, rows, cols);"
    cases = [
        f"case {i}: {call.format(bits, BOOKS.index(book), str(half).lower())}"
        for i, (bits, half, book) in enumerate(CASES)
    ]
    for name, line in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(line)
    includes = ["#include <cstdint>", *(f'#include "{source.resolve() / name}"' for name in HEADERS)]
    whole = [*includes, "#define RH_THREADS 256", *chosen, LAUNCHER.replace("CASES", " ".join(cases))]
    (folder / "exl3.cu").write_text("\n".join(whole))
    library = folder / "exl3.so"
    options = ["-arch=sm_90", "-O2", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-diag-suppress", "20012"]
    subprocess.run(["nvcc", *options, "-I", folder, "-o", library, folder / "exl3.cu"], check=True)
    return library


def theirs(library: ctypes.CDLL, kind: int, codes: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[I, O] float16 by exllamav3's kernel: T, or with suh and svh the weights."""
    rows, columns = codes.shape[:2]
    out = torch.full((16 * rows, 16 * columns), torch.nan, dtype=torch.float16, device="cuda")
    places = [ctypes.c_void_p(t.data_ptr()) for t in (out, codes, *(scales or ()))]
    places += [ctypes.c_void_p(None)] * (4 - len(places))
    torch.cuda.synchronize()
    failed = library.decode(kind, *places, rows, columns)
    if failed:
        raise SystemExit(f"exllamav3's kernel: CUDA error {failed}")
    return out


def compare(library: ctypes.CDLL, kind: int) -> tuple[int, int, float, float]:
    """(equal, all) values of T; the largest distance of our weights and of theirs to float64, in units of suh * svh."""
    bits, half, book = CASES[kind]
    equal = count = 0
    ours = fused = 0.0
    for rows, columns in BLOCKS:
        g = torch.Generator(device="cuda").manual_seed(1000 * kind + rows)
        drawn = torch.randint(-(1 << 15), 1 << 15, (rows, columns, 16 * bits + 8 * half), generator=g, device="cuda")
        codes = drawn.to(torch.int16)
        suh, svh = (torch.randn(16 * n, generator=g, device="cuda").half() for n in (rows, columns))
        plain = theirs(library, kind, codes)
        equal += int((trellis.tiles(codes, book).T.half() == plain).sum())
        count += plain.numel()
        h = trellis.hadamard(codes.device).double()
        inner = (h @ plain.double().view(-1, 128, 16 * columns)).view(16 * rows, -1, 128) @ h
        exact = inner.view(16 * rows, -1) * suh.double()[:, None] * svh.double()
        unit = (suh.double().abs()[:, None] * svh.double().abs()).clamp(min=1e-4)
        ours = max(ours, float(((trellis.matrix(codes, suh.float(), svh.float(), book).T - exact).abs() / unit).max()))
        fused = max(fused, float(((theirs(library, kind, codes, (suh, svh)) - exact).abs() / unit).max()))
    return equal, count, ours, fused


def timed(bits: int, inputs: int, outputs: int, count: int) -> tuple[float, float]:
    """(milliseconds of a matrix, MiB at the peak) of our reader on the GPU."""
    shape = (count, inputs // 16, outputs // 16, 16 * bits)
    codes = torch.randint(-(1 << 15), 1 << 15, shape, device="cuda", dtype=torch.int32).to(torch.int16)
    suh, svh = torch.ones(inputs, device="cuda"), torch.ones(outputs, device="cuda")
    trellis.matrix(codes[0], suh, svh, "mul1")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    for part in codes:
        trellis.matrix(part, suh, svh, "mul1")
    torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - start) / count
    return took, (torch.cuda.max_memory_allocated() - before) / (1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--build", type=Path)
    parser.add_argument("--only-build", action="store_true")
    options = parser.parse_args()
    folder = options.build or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "exl3.so"
    if options.only_build or not library.exists():
        library = build(options.source, folder)
    if options.only_build:
        return
    loaded = ctypes.CDLL(str(library.resolve()))
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print("| K | codebook | T equal | our weights to float64 | its float16 kernel's |\n| --- | --- | --- | --- | --- |")
    for kind, (bits, half, book) in enumerate(CASES):
        equal, count, ours, fused = compare(loaded, kind)
        print(f"| {bits + half / 2} | {book} | {equal:,} of {count:,} | {ours:.1e} | {fused:.1e} |", flush=True)
    for bits, inputs, outputs, count in ((3, 3072, 1536, 16), (3, 1536, 3072, 16), (6, 3072, 200064, 1)):
        took, peak = timed(bits, inputs, outputs, count)
        print(f"{inputs} x {outputs}, K {bits}: {took:.2f} ms a matrix, {peak:.0f} MiB at the peak")


if __name__ == "__main__":
    main()
