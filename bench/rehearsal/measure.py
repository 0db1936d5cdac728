"""Run a command against the rehearsal's server and watch what it takes: seconds, memory, disk."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from .serve import REPOSITORY, started
from .stages import GpuWatch, events_of, table_of

MODEL = f"hf:{REPOSITORY}"


def disk_bytes(folder: Path) -> tuple[int, int]:
    """Bytes that the files of a folder take on the disk: all, and of the source's shards among them."""
    found = {}
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:
            continue  # gone between listing and looking
        found[path] = status.st_blocks * 512
    return sum(found.values()), sum(size for path, size in found.items() if ".mmquant.source" in str(path))


class DiskWatch:
    """The most that a folder took while this ran, looked at every half second."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.all, self.source = folder, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.folder is not None and not self._stop.wait(0.5):
            whole, source = disk_bytes(self.folder) if self.folder.is_dir() else (0, 0)
            self.all, self.source = max(self.all, whole), max(self.source, source)


def out_of(command: list[str]) -> Path | None:
    """The folder that a command writes."""
    return Path(command[command.index("--out") + 1]) if "--out" in command else None


def measured(options: argparse.Namespace) -> None:
    """Run options.command; its exit code is ours. The measurements are one line of JSON on stdout."""
    command = [MODEL if word == "MODEL" else word for word in options.command if word != "--"]
    server, environment = started(options.layers, options.digests, options.seed)
    start, gpu, out = time.perf_counter(), GpuWatch(), out_of(command)
    with DiskWatch(out) as disk:
        code = subprocess.run(command, env=environment).returncode
    seconds = time.perf_counter() - start
    gpu.stop()
    for line in table_of(events_of(out), gpu) if out is not None else ():
        print(line, flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the command: the server is still running
    found = {
        "command": " ".join(command),
        "layers": options.layers,
        "exit": code,
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory": used.ru_maxrss * 1024,
        "peak_disk": disk.all,
        "peak_disk_of_source": disk.source,
    }
    print(json.dumps(found), flush=True)
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    sys.exit(code)
