"""How much transfer hides behind work: `mmquant fp8` from a server of limited rate, against each alone.

    python bench/prefetch.py [--scheme block channel] [--max-shards 8] [--runs 2] [--folder /dev/shm]

The server (tests/helpers/hub_server.py) runs in a process of its own. Columns: seconds of the transfer alone
(bytes / rate), of the work alone (the same command on a local folder), of both together, together / max(transfer,
work), and the CPU time that fetching and work took (the server's not counted).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _path  # noqa: F401
import torch

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))

SERVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers import hub_server
from helpers.hub_server import HubServer
hub_server.PIECE = 1 << 18
with HubServer(rate={rate}) as hub:
    hub.seed("org/m", {{p.name: p.read_bytes() for p in Path({folder!r}).iterdir()}})
    print("|".join(f"{{k}}={{v}}" for k, v in hub.environment().items()), flush=True)
    sys.stdin.read()
"""
# M2.7's 62 layers in 126 shards, each a 270th of its size.
MODEL = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 62, "num_local_experts": 8}
SHARDS = 126
SHARES = (0.5, 1.0, 2.0)  # transfer over work


def work(spec: str, out: Path, scheme: str, max_shards: int) -> float:
    """Seconds of fp8 from the opened model to the finished folder."""
    from mmquant.convert.folder.fp8 import Fp8Variant
    from mmquant.convert.hub.store import FetchOptions
    from mmquant.convert.open import open_native
    from mmquant.runs.folder import write_folder

    shutil.rmtree(out, ignore_errors=True)
    fetch = FetchOptions(work=out / ".mmquant.source", max_shards=max_shards)
    source = open_native(spec, fetch)
    source.fingerprint  # noqa: B018  (headers and samples are read here, by whoever opens a model)
    start = time.perf_counter()
    write_folder(source, Fp8Variant(scheme), out)
    seconds = time.perf_counter() - start
    if spec.startswith("hf:"):
        source.store.close()  # type: ignore[attr-defined]
    return seconds


def served(folder: Path, rate: float, out: Path, scheme: str, max_shards: int) -> float:
    code = SERVER.format(tests=str(TESTS), rate=rate, folder=str(folder))
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        os.environ.update(pair.split("=", 1) for pair in server.stdout.readline().strip().split("|"))
        return work("hf:org/m", out, scheme, max_shards)
    finally:
        server.stdin.close()
        server.wait()


def main() -> None:
    from helpers.tiny import write_tiny  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser()
    parser.add_argument("--scheme", choices=["block", "channel"], nargs="+", default=["block", "channel"])
    parser.add_argument("--max-shards", type=int, default=8)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where to work; one in memory keeps the disk out of the numbers.")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="Of the work's time: the transfer's.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder, out = write_tiny(Path(name) / "model", shards=SHARDS, **MODEL), Path(name) / "out"
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        print(f"{size / 1e6:.0f} MB, {SHARDS} shards, at most {given.max_shards} on disk")
        print("| scheme | rate MB/s | transfer s | work s | together s | ratio | CPU s of both |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for scheme in given.scheme:
            work(str(folder), out, scheme, given.max_shards)
            for _ in range(given.runs):
                measure(folder, size, out, scheme, given)


def measure(folder: Path, size: int, out: Path, scheme: str, given: argparse.Namespace) -> None:
    """One row for every share, after a run of the work alone."""
    alone = work(str(folder), out, scheme, given.max_shards)
    for transfer in [share * alone for share in given.shares]:
        before = time.process_time()
        together = served(folder, size / transfer, out, scheme, given.max_shards)
        cpu, ratio = time.process_time() - before, together / max(transfer, alone)
        row = f"{scheme} | {size / transfer / 1e6:.0f} | {transfer:.2f} | {alone:.2f} | {together:.2f}"
        print(f"| {row} | {ratio:.2f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
