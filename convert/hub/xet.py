"""Download by huggingface_hub's Xet transport in a separate process, killed when it stalls.

Xet transfers have been seen to hang without an error (xet-core 800, 850, 883), so bytes on disk are watched from
outside; without progress the process is killed and the caller goes on by plain ranges. Digests are checked either way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..files.atomic import replace_whole
from ..files.child import SAFE_PATH, environment
from .fetch import part_digest
from .http import Client, redact
from .listing import RepoFile, RepoSpec

POLL = 0.2
log = logging.getLogger("mmquant.hub")


def fetch_xet(client: Client, spec: RepoSpec, file: RepoFile, target: Path, stall: float) -> bool:
    """Fetch by huggingface_hub; False when it failed or stalled, then nothing of it is left."""
    scratch = target.with_name(target.name + ".xet")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    given = {"HF_ENDPOINT": client.endpoint.url, "HF_HUB_DISABLE_XET": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    given |= {"HF_XET_CACHE": str(scratch / "xet"), "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0"}
    given |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if client.endpoint.token:
        given["HF_TOKEN"] = client.endpoint.token
    arguments = [sys.executable, SAFE_PATH, "-m", __name__, spec.repo, spec.revision, file.path, str(scratch)]
    with open(scratch / "log", "wb") as output:
        process = subprocess.Popen(
            arguments,
            env=environment(given),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        finished = _watch(client, process, scratch, stall)
        found = scratch / file.path
        if finished and found.is_file() and part_digest(found, file) == file.digest:
            replace_whole(found, target)
            return True
        tail = (scratch / "log").read_text(errors="replace").strip().splitlines()[-1:]
        why = redact(tail[0], client.endpoint.token) if tail else "no message"
        log.warning("%s: xet %s, continuing by ranges", file.path, f"failed ({why})" if finished else "stalled")
        return False
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _watch(client: Client, process: subprocess.Popen[bytes], scratch: Path, stall: float) -> bool:
    """True when the process ended by itself, False when its folder did not grow for `stall` seconds."""
    largest, since = -1, time.monotonic()
    while process.poll() is None:
        size = _blocks(scratch)
        if size > largest:
            largest, since = size, time.monotonic()
        if time.monotonic() - since > stall or client.cancelled.is_set():
            return False
        time.sleep(POLL)
    return True


def _blocks(folder: Path) -> int:
    """Disk blocks of a folder whose files come and go."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            total += getattr(found, "st_blocks", found.st_size)
    return total


def main() -> None:
    """In the child: REPO COMMIT PATH FOLDER."""
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

    repo, revision, path, folder = sys.argv[1:5]
    hf_hub_download(repo, path, revision=revision, local_dir=folder)


if __name__ == "__main__":
    main()
