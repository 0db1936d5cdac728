"""How much of the transfer hides behind the work: `mmquant fp8` from a server of limited rate, against each part alone.

    python bench/prefetch.py [--shards 60] [--max-shards 8]

The server (tests/hub_server.py) runs in a process of its own. Columns: seconds of the transfer alone (bytes / rate), of
the work alone (the same command on a local folder), of both together, and together / max(transfer, work).
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

import mmquant

TESTS = Path(__file__).parent.parent / "tests"
assert mmquant.__file__  # imported before the tests, which have a folder of that name
sys.path.append(str(TESTS))

SERVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from hub_server import HubServer
with HubServer(rate={rate}) as hub:
    hub.seed("org/m", {{p.name: p.read_bytes() for p in Path({folder!r}).iterdir()}})
    print("|".join(f"{{k}}={{v}}" for k, v in hub.environment().items()), flush=True)
    sys.stdin.read()
"""
MODEL = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 30, "num_local_experts": 8}


def work(spec: str, out: Path, max_shards: int) -> float:
    """Seconds of fp8 --scheme channel from the opened model to the finished folder."""
    from mmquant.convert.fp8_variant import Fp8Variant
    from mmquant.convert.hub_store import FetchOptions
    from mmquant.convert.open import open_native
    from mmquant.pipeline import write_folder

    shutil.rmtree(out, ignore_errors=True)
    fetch = FetchOptions(work=out / ".mmquant.source", max_shards=max_shards, block=1 << 19, connections=4)
    source = open_native(spec, fetch)
    source.fingerprint  # noqa: B018  (headers and samples are read here, by whoever opens a model)
    start = time.perf_counter()
    write_folder(source, Fp8Variant("channel"), out)
    seconds = time.perf_counter() - start
    if spec.startswith("hf:"):
        source.store.close()  # type: ignore[attr-defined]
    return seconds


def served(folder: Path, rate: float, out: Path, max_shards: int) -> float:
    code = SERVER.format(tests=str(TESTS), rate=rate, folder=str(folder))
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        os.environ.update(pair.split("=", 1) for pair in server.stdout.readline().strip().split("|"))
        return work("hf:org/m", out, max_shards)
    finally:
        server.stdin.close()
        server.wait()


def main() -> None:
    from tiny import write_tiny  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--max-shards", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, out = write_tiny(Path(name) / "model", shards=given.shards, **MODEL), Path(name) / "out"
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        work(str(folder), out, given.max_shards)
        alone = min(work(str(folder), out, given.max_shards) for _ in range(2))
        print(
            f"{size / 1e6:.0f} MB, {given.shards} shards, at most {given.max_shards} on disk; work alone {alone:.2f} s"
        )
        print("| rate MB/s | transfer s | work s | together s | ratio |\n| --- | --- | --- | --- | --- |")
        for share in (0.5, 1.0, 2.0, 4.0):
            transfer = share * alone
            together = served(folder, size / transfer, out, given.max_shards)
            ratio = together / max(transfer, alone)
            print(f"| {size / transfer / 1e6:.0f} | {transfer:.2f} | {alone:.2f} | {together:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
