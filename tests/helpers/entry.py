"""The command line's own entry point, in this process."""

from __future__ import annotations

import sys

import pytest

import mmquant.commands.cli as cli


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["mmquant", *map(str, arguments)])
    monkeypatch.setattr(cli, "catch_signals", lambda: None)  # they would stay with pytest's own process
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err
