"""Artifacts of two checkouts, byte by byte: every format of the demo model, written by each with its own code.

    python bench/same_bytes.py BEFORE AFTER [--only fp8,int4-rtn] [--python PYTHON]

BEFORE and AFTER are checkouts (git worktree add ../before main). Each writes into a temporary folder by PYTHON (this
one by default) with the checkout first on the path. Prints one line per artifact; exit code 1 when any file differs.
Manifests are left out: they hold the time of the run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TEXT = ("--windows", "4")
COMMANDS = {
    "fp8-block": ("fp8", "--scheme", "block"),
    "fp8-channel": ("fp8", "--scheme", "channel"),
    "int4-rtn": ("int4", "--method", "rtn"),
    "int4-rtn-awq": ("int4", "--method", "rtn", "--format", "awq"),
    "int4-rtn-gptq": ("int4", "--method", "rtn", "--format", "gptq"),
    "int4-gptq": ("int4", "--method", "gptq", *TEXT),
    "int4-awq": ("int4", "--method", "awq", *TEXT),
    "gguf-q8": ("gguf", "--type", "Q8_0", "--name", "m"),
    "gguf-q4-fast": ("gguf", "--type", "Q4_K_M", "--effort", "fast", "--name", "m", *TEXT),
    "gguf-q4": ("gguf", "--type", "Q4_K_M", "--name", "m", *TEXT),
}
MANIFEST = "mmquant.fit.json"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 per file of a finished artifact."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def write(checkout: Path, command: tuple[str, ...], out: Path, python: str) -> dict[str, str]:
    """Run one command with a checkout's code and read what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    arguments = [python, "-m", "mmquant", *command, "--model", "demo", "--out", str(out)]
    done = subprocess.run(arguments, env=environment, cwd=out.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: mmquant {' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return digests(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default=",".join(COMMANDS), help="artifacts, joined by commas")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    failed = False
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            before, after = (
                write(checkout, COMMANDS[name], Path(folder, side), options.python)
                for side, checkout in (("before", options.before), ("after", options.after))
            )
        changed = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
        print(f"{name:14} {'differs: ' + ', '.join(changed) if changed else f'equal, {len(before)} files'}", flush=True)
        failed |= bool(changed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
