"""The core commands run without Linux's own calls, and on file systems without locks or fsync.

A module that Python loads at its start takes the modules and calls away that Windows lacks, or makes calls fail as
CIFS, FUSE and NFS do. It shows what mmquant itself needs; Windows itself is not run here.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4, "num_hidden_layers": 1}
LACKING = """
import errno, fcntl, os, stat
code = int(os.environ["LACKING"])
if os.environ["CALL"] in ("fsync", "both"):
    sync = os.fsync
    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        if stat.S_ISDIR(os.fstat(number).st_mode): raise OSError(code, os.strerror(code))
        return sync(number)
    os.fsync = fsync
if os.environ["CALL"] in ("flock", "both"):
    def flock(file, operation): raise OSError(code, os.strerror(code))
    fcntl.flock = flock
"""


def python(shim: Path, code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(shim), "TRITON_INTERPRET": "", **variables}
    command = [sys.executable, *code.split(), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", **SIZES)


def shim(folder: Path, text: str) -> Path:
    (folder / "shim").mkdir()
    (folder / "shim" / "sitecustomize.py").write_text(text)
    return folder / "shim"


def test_the_core_commands_need_nothing_that_windows_lacks(tmp_path: Path, model: Path) -> None:
    where = shim(tmp_path, WINDOWS)
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
    for command in commands:
        done = python(where, "-m mmquant", *command)
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
    where, out = shim(tmp_path, LACKING), tmp_path / "out"
    done = python(where, "-m mmquant", "fp8", "--model", model, "--out", out, CALL=call, LACKING=str(number))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this file system") == 1  # beside a progress bar, where the machine is slow
    (line,) = (line for line in done.stderr.splitlines() if "this file system" in line)
    assert str(out) in line
    assert words in line


def test_a_failing_disk_is_no_lack(tmp_path: Path, model: Path) -> None:
    where, out = shim(tmp_path, LACKING), tmp_path / "out"
    done = python(where, "-m mmquant", "fp8", "--model", model, "--out", out, CALL="fsync", LACKING=str(errno.EIO))
    assert done.returncode == 1
    assert not (out / "mmquant.fit.json").exists()
