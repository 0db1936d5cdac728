"""The command line as a process of its own that need not load torch again: it is forked from one that has.

Loading torch is 2 of a small command's 2.7 s of processor time. What reads the environment when it is imported, such
as the hubs' clients, is imported by each process anew. Tests of starting Python start their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "mmquant.runs.run", "mmquant.runs.push", "mmquant.runs.pull", "mmquant.runs.fit"]
)


def program(arguments: list[str]) -> None:
    """`python -m mmquant ARGUMENTS...` in this process."""
    sys.argv = ["mmquant", *arguments]
    runpy.run_module("mmquant", run_name="__main__", alter_sys=True)


def within(file_bytes: int | None, arguments: list[str]) -> None:
    """A command line whose files cannot grow past so many bytes."""
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    program(arguments)


def _child(work: Callable[..., None], given: tuple[Any, ...], environment: dict[str, str], cwd: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for handle, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(out, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND), handle)
    try:
        work(*given)
    finally:
        atexit._run_exitfuncs()


def afresh(
    work: Callable[..., None],
    *given: Any,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Do `work`, a function that can be pickled, in a new process with this one's or another environment."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ if env is None else env)
        process = SERVER.Process(target=_child, args=(work, given, environment, os.fspath(cwd or os.getcwd()), folder))
        process.start()
        process.join()
        assert process.exitcode is not None
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(given, process.exitcode, out, err)


def mmquant(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line; like subprocess.run with its output captured as text."""
    return afresh(program, [str(word) for word in arguments], env=env, cwd=cwd)
