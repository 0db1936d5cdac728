"""Processes that kill themselves at a counted change of a folder, so no kill depends on a clock.

A change is what Python reports to its audit hooks: a file opened for writing, a rename, a removal. The process gets
SIGKILL just before the change happens, so nothing of it is cleaned up. BYTES as the pattern kills it in the middle of
a write instead, where a file would grow past so many bytes.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from helpers.command import afresh, program
from mmquant.commands.cli import cli

BYTES = "bytes"
DEAD = (-signal.SIGKILL, -signal.SIGXFSZ)
WRITES = os.O_WRONLY | os.O_RDWR


def change_of(event: str, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
    """What an audit event is about to do to a file, and its path; None for everything else."""
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        return ("open", os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes)) else None
    if event == "os.rename":
        return "rename", os.fsdecode(arguments[1])
    if event == "os.remove":
        return "remove", os.fsdecode(arguments[0])
    return None


def die_at(folder: Path, pattern: str, count: int) -> None:
    """From here on this process dies before its `count`-th change in `folder` that `pattern` finds in "KIND name"."""
    if pattern == BYTES:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
        return
    left, here, wanted = count, f"{folder.absolute()}{os.sep}", re.compile(pattern)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        found = change_of(event, arguments)
        if found is None:
            return
        kind, path = found
        path = os.path.abspath(path)
        if path.startswith(here) and wanted.search(f"{kind} {path.removeprefix(here)}"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def forked(work: Callable[..., object], *arguments: object) -> ForkProcess:
    """A process that has begun to do `work`, forked from this one."""

    def child() -> None:
        # torch makes a new thread pool after a fork, and two threads that ask first at once may find none.
        torch.set_num_threads(torch.get_num_threads())
        work(*arguments)

    process = ForkProcess(target=child)
    process.start()
    return process


def killed_at(folder: Path, count: int, work: Callable[[], object], pattern: str = "") -> bool:
    """Run `work` in a forked process that dies before its `count`-th change in `folder`. Whether it died."""

    def child() -> None:
        die_at(folder, pattern, count)
        work()

    process = forked(child)
    process.join()
    assert process.exitcode in (0, *DEAD)
    return process.exitcode != 0


def _dying(folder: Path, pattern: str, count: int, arguments: list[str]) -> None:
    die_at(folder, pattern, count)
    program(arguments)


def command_killed_at(folder: Path, pattern: str, count: int, *arguments: object) -> None:
    """Run a command line that dies before the `count`-th change of `folder` that `pattern` finds, and see it die."""
    done = afresh(_dying, folder, pattern, count, [str(word) for word in arguments])
    assert done.returncode in DEAD, f"it ended with {done.returncode} instead: {done.stderr}"


def check_continued(folder: Path, *arguments: object) -> None:
    """A command line that writes a folder, killed on its way and given again, leaves the bytes of one left alone."""
    whole, again = folder / "whole", folder / "again"
    command_killed_at(again, "rename .*progress", 2, *arguments, "--out", again)
    assert not (again / "mmquant.fit.json").exists()
    for out in (whole, again):
        assert CliRunner().invoke(cli, [*map(str, arguments), "--out", str(out)]).exception is None
    first, second = ({p.name: p.read_bytes() for p in out.glob("*.safetensors")} for out in (whole, again))
    assert first == second


def until(process: subprocess.Popen[str] | subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait, however long it takes, until a process that a server holds up has come to some point."""
    while not reached():
        assert process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.005)


def kill(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
