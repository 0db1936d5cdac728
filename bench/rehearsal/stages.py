"""Where a run's time went, told from its log: by step, artifact and stage, and how busy the GPU was meanwhile."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = "mmquant-run.log.jsonl"
BUSY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "250"]


class GpuWatch:
    """Samples of (time, share of time in which kernels ran, bytes in use) of the first GPU; none without one."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, int]] = []
        try:
            self._process = subprocess.Popen(BUSY, stdout=subprocess.PIPE, text=True)
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            share, used = line.split(",")
            self.samples.append((time.time(), float(share) / 100, int(used) << 20))

    def stop(self) -> None:
        """Sample no more."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def between(self, first: float, last: float) -> tuple[float, int]:
        """Mean share and most bytes of an interval."""
        inside = [sample for sample in self.samples if first <= sample[0] <= last]
        shares = [share for _, share, _ in inside]
        return sum(shares) / max(1, len(shares)), max((used for _, _, used in inside), default=0)


def events_of(out: Path) -> list[dict[str, Any]]:
    """The log's events; none where the command keeps no log."""
    path = out / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table_of(events: list[dict[str, Any]], gpu: GpuWatch) -> Iterator[str]:
    """A line for every artifact of every step, and one for what worked behind."""
    began = next((event["time"] for event in events if event["event"] == "begin"), 0.0)
    for event in events:
        if event["event"] == "artifact":
            yield f"step {event['step']} {event['name']}: {event['seconds']:.1f} s: {_stages(event['stages'])}"
        elif event["event"] == "step":
            share, used = gpu.between(began, event["time"])
            whole, memory = event["time"] - began, event["memory"] / 1e9
            peak = f"memory {memory:.1f} GB, GPU {event['gpu'] / 1e9:.1f} GB at most ({used / 1e9:.1f} in use)"
            yield f"step {event['step']} all: {whole:.1f} s, GPU busy {share:.0%}, {peak}; {_stages(event['behind'])}"
            began = event["time"]
        elif event["event"] in ("finished", "stopped"):
            yield f"{event['event']} {event['time'] - began:.1f} s behind the last step {event.get('error', '')}"


def _stages(found: dict[str, float]) -> str:
    long = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in long if seconds >= 0.05)
