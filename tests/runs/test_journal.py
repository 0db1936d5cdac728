"""What is read of a run's log."""

from __future__ import annotations

from pathlib import Path

from mmquant.runs.journal import LOG, read_log


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    lines = (
        b'{"event": "begin"}',
        b"",
        b"3",
        b"[]",
        b'{"even',
        b'{"event": 3}',
        b"\xff\x00",
        b'{"event": "stopped", "ti',
    )
    (tmp_path / LOG).write_bytes(b"\n".join([*lines, b'{"event": "finished"}']))
    assert [event["event"] for event in read_log(tmp_path)] == ["begin", "finished"]
