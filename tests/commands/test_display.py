"""The live lines: what stands on the screen, at any width, whoever writes in between."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest

from helpers.screen import Screen, Stream, shown
from helpers.tiny import write_tokenized
from mmquant.commands.display import Display


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(columns: int) -> tuple[Display, Screen, Clock]:
    screen, clock = Screen(columns), Clock()
    return Display(Stream(screen), clock, lambda: (columns, 24)), screen, clock


def lines(screen: Screen) -> list[str]:
    return [line.rstrip() for line in screen.lines if line.strip()]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_what_a_run_shows(columns: int) -> None:
    display, screen, clock = make(columns)
    run = display.start("run", 64, "step", 36)
    fetch = display.start("fetch", None, "B", 0)
    assert lines(screen) == []  # what is done sooner shows nothing
    clock.now = 20.0
    run.advance(2)
    fetch.expect(5 * 10**9)
    clock.now = 20.5
    fetch.advance(10**9)
    run.tell("layer 37 of 62: int4-g32; 9.1 GB memory, 123.4 GB disk free, 2 experts without tokens")
    display.message("mmquant: int4-g32: layer 36: experts 3, 4 saw no token")
    found = lines(screen)
    message = "mmquant: int4-g32: layer 36: experts 3, 4 saw no token"
    assert found[0] == message[:columns].rstrip()
    head = found[-3]
    assert head.startswith("run: step 38 of 64, 10.2 s each, 4:26"[: columns - 1])
    assert ("[" in head) == (columns > 70)
    assert found[-2].startswith("  layer 37 of 62: int4-g32")
    assert found[-1].startswith("fetch: 1.00 of 5.00 GB, 0.05 GB/s"[: columns - 1])
    assert all(len(line) < columns for line in found[-3:])
    fetch.finish()
    run.finish()
    run.finish()
    assert lines(screen)[-1].startswith("run: step 38 of 64")
    assert not any("fetch" in line for line in lines(screen))


def test_lines_of_threads_are_never_glued() -> None:
    display, screen, clock = make(columns=80)
    bars = [display.start(f"phase{number}", 50, "step", 0) for number in range(3)]
    clock.now = 5.0

    def work(number: int) -> None:
        for at in range(50):
            clock.now += 0.05
            bars[number].advance()
            display.message(f"mmquant: {number} says {at}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    display.close()
    found = lines(screen)
    assert sorted(found) == sorted(f"mmquant: {number} says {at}" for number in range(3) for at in range(50))


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_a_command_on_a_terminal(columns: int, tmp_path: Path) -> None:
    """Whole lines, and none of them wraps."""
    recipe = tmp_path / "recipe.yaml"
    write_tokenized(tmp_path / "tiny", hidden_size=64, intermediate_size=64)
    recipe.write_text("model: tiny\nvariants:\n  fp8: {command: fp8}\n  Q8_0: {command: gguf, type: Q8_0}\n")
    words = [sys.executable, "-m", "mmquant", "run", "recipe.yaml", "--out", "o", "--device", "cpu"]
    screen, code = shown(words, columns, os.environ, tmp_path)
    assert code == 0
    begins = "mmquant: |run: step |artifact |fp8 |Q8_0 |next: |tiny: "
    assert [line for line in lines(screen) if not re.match(begins, line)] == []
    assert lines(screen)[-1].startswith("tiny: 2 artifacts in ")
