"""The core commands run without Linux's own calls, and on file systems without locks or fsync.

A module that Python loads at its start takes the modules and calls away that Windows lacks; other calls are made to
fail as on CIFS, FUSE and NFS. It shows what mmquant itself needs; Windows itself is not run here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command import afresh, program
from helpers.tiny import write_tiny
from mmquant.convert.files.lock import HOLDER, LOCK

WINDOWS = """
import os, shutil, sys
import subprocess, tempfile  # the standard library's own uses of what goes now
GONE = {"fcntl", "termios", "triton", "resource", "pwd", "grp", "tty", "pty"}
for name in GONE: sys.modules.pop(name, None)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE: raise ModuleNotFoundError("No module named %r" % name, name=name)
sys.meta_path.insert(0, Block())
usage = shutil.disk_usage
def disk_usage(path):
    os.statvfs = statvfs
    try: return usage(path)
    finally: del os.statvfs
statvfs, shutil.disk_usage = os.statvfs, disk_usage
for name in ("pwrite", "pread", "preadv", "pwritev", "posix_fadvise", "posix_fallocate", "sched_getaffinity",
             "fdatasync", "statvfs", "killpg", "setsid", "sysconf", "mkfifo", "geteuid"):
    if hasattr(os, name): delattr(os, name)
"""
EACH = """
import json, sys
from mmquant.commands.cli import cli
for line in json.loads(sys.argv[1]): cli.main(line, standalone_mode=False)
"""
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4, "num_hidden_layers": 1}


def lacking(call: str, code: int, arguments: list[str]) -> None:
    """A command line where these calls fail with this error."""
    sync = os.fsync

    def fsync(file: Any) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))
        sync(file)

    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    if call in ("fsync", "both"):
        os.fsync = fsync
    if call in ("flock", "both"):
        fcntl.flock = flock
    program(arguments)


def python(shim: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(shim), "TRITON_INTERPRET": ""}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", **SIZES)


def test_the_core_commands_need_nothing_that_windows_lacks(tmp_path: Path, model: Path) -> None:
    where = tmp_path / "shim"
    where.mkdir()
    (where / "sitecustomize.py").write_text(WINDOWS)
    blocked = python(where, "-c", "import os; print(hasattr(os, 'pwrite')); import fcntl")
    assert (blocked.stdout, blocked.returncode) == ("False\n", 1)
    commands = (
        ("inspect", model),
        ("fp8", "--model", model, "--out", tmp_path / "fp8"),
        ("fp8", "--model", model, "--out", tmp_path / "native", "--scheme", "native"),
        ("gguf", "--model", "demo", "--type", "Q8_0", "--out", tmp_path / "gguf"),
        ("int4", "--model", model, "--method", "rtn", "--group-size", "32", "--out", tmp_path / "int4"),
        ("eval", tmp_path / "gguf", "--reference", "demo", "--windows", "1", "--context", "32"),
    )
    done = python(where, "-c", EACH, json.dumps([[str(word) for word in command] for command in commands]))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for name in ("fp8", "native", "gguf", "int4"):
        assert (tmp_path / name / "mmquant.fit.json").is_file()
        assert not [p.name for p in (tmp_path / name).iterdir() if p.name in (LOCK, HOLDER) or p.suffix == ".tmp"]


@pytest.mark.parametrize(
    "call, number, words",
    [
        ("fsync", errno.EINVAL, "has no fsync of folders (Invalid argument)"),
        ("flock", errno.ENOSYS, "has no file locks (Function not implemented)"),
        ("flock", errno.ENOLCK, "has no file locks (No locks available)"),
        ("both", errno.EINVAL, "and no fsync of folders"),
    ],
)
def test_a_file_system_that_lacks_them_is_one_warning(
    tmp_path: Path, model: Path, call: str, number: int, words: str
) -> None:
    out = tmp_path / "out"
    done = afresh(lacking, call, number, ["fp8", "--model", str(model), "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this file system") == 1  # beside a progress bar, where the machine is slow
    (line,) = (line for line in done.stderr.splitlines() if "this file system" in line)
    assert str(out) in line
    assert words in line


def test_a_failing_disk_is_no_lack(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    done = afresh(lacking, "fsync", errno.EIO, ["fp8", "--model", str(model), "--out", str(out)])
    assert done.returncode == 1
    assert not (out / "mmquant.fit.json").exists()
