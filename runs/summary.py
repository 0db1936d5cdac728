"""What a finished run says: a line per artifact, where each loses most, what was rescued, and what comes next."""

from __future__ import annotations

from typing import Any

from mmquant.monitor import KINDS
from mmquant.tables import Size, clock, plural, table

from .journal import CHECKED, LOG, WRITTEN, Journal, read_log

WEIGHTS = "weights GB"  # as `eval` counts them: without headers, tokenizer and what else lies in the folder


def table_of(journal: Journal) -> list[dict[str, Any]]:
    """One row for each artifact of a journal."""
    events = read_log(journal.folder)
    return [
        {"name": name, "command": entry.asked["command"], "state": entry.state}
        | {**totals(events, name), **entry.facts}
        for name, entry in journal.artifacts.items()
    ]


def totals(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Seconds of an artifact's steps, and how many of each kind were found in them, over all runs of its folder."""
    steps = {event["step"]: event for event in events if event["event"] == "artifact" and event.get("name") == name}
    found = {kind: sum(event.get(kind, 0) for event in steps.values()) for kind in KINDS}
    return {"seconds": sum(event["seconds"] for event in steps.values())} | {k: n for k, n in found.items() if n}


def summary(journal: Journal, seconds: float) -> list[str]:
    """What a finished run says."""
    rows: list[tuple[object, ...]] = []
    artifacts = table_of(journal)
    for row in artifacts:
        scores = row.get("scores", {})
        numbers = [number(scores.get(n)) for n in ("bits", "kld", "top1")]
        size = Size(row["bytes"]) if "bytes" in row and row["command"] != "calibrate" else None
        rows.append((row["name"], row["state"], size, *numbers, clock(row["seconds"])))
    lines = table(("artifact", "state", WEIGHTS, "bits", "KLD", "top-1", "time"), rows, text=("artifact", "state"))
    for row in artifacts:
        lines += [f"failed: {text}" for text in row.get("failures", [])]
        lines += [f"{row['name']}: {'; '.join(found)}" for found in [remarks(row)] if found]
    lines += [f"{name}: weights are in {where} without card and manifest" for name, where in half_published(journal)]
    lines += [*journal.fits, *next_steps(journal)]
    made = f"{plural(len(rows), 'artifact')} in {clock(seconds)}"
    return [*lines, f"{journal.model}: {made}; log in {journal.folder / LOG}"]


def remarks(row: dict[str, Any]) -> list[str]:
    """Where an artifact loses most, and what was done beyond rounding."""
    worst = row.get("scores", {}).get("worst_layers", [])
    lines = [f"loses most in layers {', '.join(map(str, worst))}"] if worst else []
    known = [f"{words}: {row[kind]}" for kind, words in KINDS.items() if row.get(kind)]
    return lines + known


def next_steps(journal: Journal) -> list[str]:
    """What to type next."""
    folder, ready = journal.folder, {n: e for n, e in journal.artifacts.items() if e.state in (WRITTEN, CHECKED)}
    passed = [
        name
        for name, entry in ready.items()
        if not entry.facts.get("failures") and entry.asked["command"] != "calibrate"
    ]
    if any(entry.facts.get("failures") for entry in ready.values()):
        return ["next: other options for what failed, or another gate, in the recipe; then the same command again"]
    return [f"next: mmquant push {folder / passed[0]} --repo ORG/NAME, or push: in the recipe"] if passed else []


def half_published(journal: Journal) -> list[tuple[str, str]]:
    """Artifacts that failed a gate after weights of theirs had left, and the repositories that hold them."""
    failed = {name: entry.facts for name, entry in journal.artifacts.items() if entry.facts.get("failures")}
    there = {name: set(facts.get("early", [])) - set(facts.get("pushed", [])) for name, facts in failed.items()}
    return [(name, where) for name, places in there.items() for where in sorted(places)]


def number(value: object) -> str:
    """A score as the summary shows it; of a KL divergence its mean."""
    found = value.get("mean") if isinstance(value, dict) else value
    return f"{found:.4g}" if isinstance(found, int | float) else "-"
