"""Generate conversations in MiniMax-M2's format from dictionaries, Python's documentation and arithmetic."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

TURNS = 9000
MODULES = (
    "os",
    "re",
    "json",
    "math",
    "random",
    "itertools",
    "shutil",
    "string",
    "statistics",
    "datetime",
    "textwrap",
    "socket",
    "subprocess",
    "threading",
    "urllib.parse",
    "collections",
    "functools",
    "pathlib",
    "csv",
    "sqlite3",
)
CITIES = (
    "Berlin Paris Madrid Rome Tokyo Beijing Cairo Lima Oslo Delhi Boston Sydney Vienna Prague Seoul Nairobi".split()
)
ASKS = (
    "What does “{}” mean?",
    "Define {}.",
    "Please explain the word {} to me.",
    "Was bedeutet „{}“?",
    "Que signifie « {} » ?",
    "¿Qué significa «{}»?",
    "Что значит «{}»?",
    "“{}”是什么意思？",
    "「{}」とは何ですか。",
    "I came across {} in a book. What is it?",
    "In one sentence: what is {}?",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer briefly.",
    "你是一个乐于助人的助手。",
    "You are an assistant with tools. Use them when they help.",
)
PLEASE = ("Thank you! And {}?", "Good. Next: {}", "One more: {}", "{}")


def turn(role: str, text: str) -> str:
    return f"]~b]{role}\n{text}[e~[\n"


def words(debs: Path) -> list[tuple[str, str]]:
    lines = []
    for part in ("noun", "verb", "adj"):
        lines += (debs / "wordnet-base/usr/share/wordnet" / f"data.{part}").read_text().splitlines()
    return [(line.split()[4].replace("_", " "), line.split(" | ")[1].strip()) for line in lines if " | " in line]


def functions() -> list[tuple[str, str, str]]:
    """Name, signature and first paragraph of documented functions of the standard library."""
    found = []
    for name in MODULES:
        for key, value in vars(import_module(name)).items():
            text = inspect.getdoc(value)
            if key.startswith("_") or not callable(value) or not text:
                continue
            try:
                signature = str(inspect.signature(value))
            except (TypeError, ValueError):
                signature = "(...)"
            found.append((f"{name}.{key}", signature, text.split("\n\n")[0]))
    return found


def definition(r: random.Random, entries: list[tuple[str, str]]) -> tuple[str, str]:
    word, gloss = r.choice(entries)
    first = gloss.split(";")[0].strip()
    examples = re.findall(r'"([^"]+)"', gloss)
    think = f"<think>\nThe user asks about “{word}”. It means: {first}.\n</think>\n\n"
    answer = f"**{word}**: {first}." + (f" For example: “{r.choice(examples)}”" if examples else "")
    return r.choice(ASKS).format(word), think + answer


def arithmetic(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(2, 999), r.randint(2, 99)
    kind = r.randrange(4)
    if kind == 0:
        steps = f"{a} × {b} = {a} × {b // 10 * 10} + {a} × {b % 10} = {a * (b // 10 * 10)} + {a * (b % 10)} = {a * b}."
        return f"What is {a} times {b}?", f"<think>\n{steps}\n</think>\n\n{a} × {b} = **{a * b}**."
    if kind == 1:
        return f"Compute {a} + {b}.", f"<think>\n{a} + {b} = {a + b}.\n</think>\n\nThe sum is **{a + b}**."
    if kind == 2:
        price, count = r.randint(1, 40), r.randint(2, 20)
        think = f"{count} books at {price} dollars each cost {count} × {price} = {count * price} dollars."
        return (
            f"A book costs {price} dollars. What do {count} books cost?",
            f"<think>\n{think}\n</think>\n\n{count * price} dollars.",
        )
    rows = [(r.choice(CITIES), r.randint(-5, 38), r.randint(20, 99)) for _ in range(r.randint(3, 6))]
    table = "| city | °C | humidity |\n| --- | --- | --- |\n" + "\n".join(f"| {c} | {t} | {h} % |" for c, t, h in rows)
    warmest = max(rows, key=lambda row: row[1])
    return (
        f"Which city is the warmest?\n\n{table}",
        f"<think>\nThe largest of {', '.join(str(t) for _, t, _ in rows)} is {warmest[1]}.\n</think>\n\n"
        f"{warmest[0]}, at {warmest[1]} °C.",
    )


def documentation(r: random.Random, known: list[tuple[str, str, str]]) -> tuple[str, str]:
    name, signature, text = r.choice(known)
    ask = r.choice(("What does Python's `{}` do?", "Explain `{}`.", "How do I call `{}`?", "`{}` 怎么用？")).format(
        name
    )
    return ask, f"<think>\nThe signature is {name}{signature}.\n</think>\n\n`{name}{signature}`: {text}"


def tools(r: random.Random) -> str:
    city, days = r.choice(CITIES), r.randint(1, 7)
    schema = {
        "name": "get_weather",
        "description": "Weather forecast of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    }
    forecast = [{"day": d + 1, "high": r.randint(5, 35), "rain": r.random() < 0.3} for d in range(days)]
    parameters = f'<parameter name="city">{city}</parameter>\n<parameter name="days">{days}</parameter>'
    call = f'<minimax:tool_call>\n<invoke name="get_weather">\n{parameters}\n</invoke>\n</minimax:tool_call>'
    wet = [str(f["day"]) for f in forecast if f["rain"]]
    answer = f"In {city} highs are {', '.join(str(f['high']) for f in forecast)} °C" + (
        f"; rain on day {', '.join(wet)}." if wet else "; no rain."
    )
    text = turn("system", f"{r.choice(SYSTEMS)}\n\n# Tools\n<tools>\n<tool>{json.dumps(schema)}</tool>\n</tools>")
    text += turn(
        "user",
        r.choice(
            (
                "Weather in {} for {} days?",
                "How will the weather be in {} in the next {} days?",
                "{}未来{}天天气怎么样？",
            )
        ).format(city, days),
    )
    text += turn("ai", f"<think>\nI need the forecast of {city}.\n</think>\n\n{call}")
    text += turn("tool", f"<response>{json.dumps(forecast)}</response>")
    return text + turn("ai", f"<think>\nThe forecast has {days} days.\n</think>\n\n{answer}")


def conversations(debs: Path) -> Iterator[tuple[str, str]]:
    """TURNS documents of several turns each; the same on every run for the same dictionaries."""
    r, entries, known = random.Random(7), words(debs), functions()
    for number in range(TURNS):
        if number % 4 == 3:
            yield f"tools{number}", "]~!b[" + "".join(tools(r) for _ in range(2))
            continue
        text = turn("system", r.choice(SYSTEMS)) if r.random() < 0.5 else ""
        for place in range(r.randint(4, 9)):
            kind = r.random()
            ask, answer = (
                definition(r, entries) if kind < 0.6 else arithmetic(r) if kind < 0.8 else documentation(r, known)
            )
            text += turn("user", ask if place == 0 else r.choice(PLEASE).format(ask)) + turn("ai", answer)
        yield f"chat{number}", "]~!b[" + text
