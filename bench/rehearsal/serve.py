"""The hub's protocol over generated shards: the test server's own handlers, with objects that nobody stores."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .model import LAYERS, Model
from .shard import KNOWN, Digests, Shard

sys.path.append(str(Path(__file__).parent.parent.parent / "tests"))

from helpers import hub_server
from helpers.hub_server import HubServer

REPOSITORY = "rehearsal/MiniMax-M2.7"
PIECE = 1 << 20  # bytes that are made and sent at once
PART, CONNECTIONS = 64 << 20, 8  # of one measurement of the server
READY = "the checkpoint is served"


def publish(hub: HubServer, model: Model, digests: Digests, seed: int = 0, repository: str = REPOSITORY) -> str:
    """Put the model into a repository of the hub; its commit. Digests that are not known yet are computed first."""
    files = {name: hub.store(name, data) for name, data in model.small_files().items()}
    for layout in model.layouts:
        shard = Shard(layout, seed)
        digest = digests.of(shard)
        hub.objects[digest] = shard
        files[layout.name] = hub.entry(layout.name, digest)
    repo = hub.repos.setdefault(repository, hub_server.Repo(repository))
    return hub.commit(repo, "main", files, "the release's geometry, random weights").oid


def serve(options: argparse.Namespace) -> None:
    """Serve until stdin ends; prints what a client's environment needs."""
    hub_server.PIECE = PIECE
    with HubServer() as hub:
        publish(hub, Model(options.layers), Digests(options.digests), options.seed)
        for name, value in hub.environment().items():
            print(f"{name}={value}", flush=True)
        print(READY, flush=True)
        sys.stdin.read()


def speed(options: argparse.Namespace) -> None:
    """Fetch the first shards over as many connections as a client opens, and say at what rate they come."""
    server, environment = started(options.layers, options.digests, options.seed)
    layouts, url = Model(options.layers).layouts[:2], environment["HF_ENDPOINT"]

    def read(part: tuple[str, int, int]) -> int:
        name, first, last = part
        request = urllib.request.Request(f"{url}/{REPOSITORY}/resolve/main/{name}")
        request.add_header("Range", f"bytes={first}-{last}")
        got = 0
        with urllib.request.urlopen(request) as answer:
            while data := answer.read(PIECE):
                got += len(data)
        return got

    parts = [(a.name, at, min(at + PART, a.bytes) - 1) for a in layouts for at in range(0, a.bytes, PART)]
    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        size = sum(pool.map(read, parts))
    seconds = time.perf_counter() - began
    print(f"{size:,} bytes in {seconds:.2f} s: {size / seconds / 1e9:.2f} GB/s over {CONNECTIONS} connections")
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def started(layers: int = LAYERS, digests: Path = KNOWN, seed: int = 0) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The server in a process of its own, and the environment of its clients. It ends when its stdin is closed."""
    command = [sys.executable, "-m", "bench.rehearsal", "serve", "--layers", str(layers), "--seed", str(seed)]
    root = Path(__file__).parent.parent.parent
    server = subprocess.Popen(
        [*command, "--digests", str(digests)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert server.stdout is not None
    found: dict[str, str] = {}
    for line in server.stdout:
        if line.strip() == READY:
            return server, {**os.environ, **found}
        name, _, value = line.strip().partition("=")
        found[name] = value
    raise SystemExit(f"the server ended with {server.wait()}")
