"""Adds tool-call transcripts to written chats: `python3.11 transcripts.py WRITTEN.jsonl calibration/chat.jsonl`.

The sentences are ours, in ten languages; what the tools answer is real: signatures and docstrings of CPython's standard
library (PSF licence), values that Python computes, listings of the library's modules.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import itertools
import json
import math
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

# language -> (question, thought, lead of the answer), for the documentation tool and the interpreter; what is asked.
PHRASES = json.loads((Path(__file__).parent / "phrases.json").read_text("utf-8"))
DOCS, COMPUTE, WHAT = PHRASES["docs"], PHRASES["compute"], PHRASES["what"]
MODULES = (
    "itertools functools collections heapq bisect statistics fractions decimal textwrap string re json csv pathlib "
    "shutil tempfile zipfile tarfile gzip hashlib hmac secrets random datetime calendar time sched threading queue "
    "subprocess socket selectors ssl http.client urllib.parse email.message html xml.etree.ElementTree sqlite3 logging "
    "argparse configparser shlex glob fnmatch linecache difflib dis ast inspect types copy pprint enum dataclasses "
    "contextlib weakref gc tracemalloc cProfile timeit unittest.mock doctest pdb asyncio concurrent.futures "
    "multiprocessing struct"
).split()


def call(function: str, /, **arguments: object) -> dict[str, Any]:
    """A tool call of a message."""
    return {"type": "function", "function": {"name": function, "arguments": arguments}}


def calling(thought: str, made: dict[str, Any]) -> dict[str, Any]:
    """An assistant's turn that thinks and calls."""
    return {"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": [made]}


def tool(name: str, description: str, *parameters: str) -> dict[str, Any]:
    """A tool with string parameters."""
    schema = {"type": "object", "properties": {p: {"type": "string"} for p in parameters}, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


READ = tool("read_docs", "Signature and documentation of a Python object.", "name")
RUN = tool("python", "Evaluate a Python expression and print the result.", "expression")


def documented() -> list[tuple[str, str, str]]:
    """(qualified name, signature, docstring) of the standard library's documented callables."""
    found = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", [n for n in dir(module) if not n.startswith("_")])):
            value = getattr(module, name, None)
            text = inspect.getdoc(value) if callable(value) else None
            if (
                value is None
                or not text
                or not 80 < len(text) < 1600
                or getattr(value, "__module__", module_name) is None
            ):
                continue
            try:
                signature = str(inspect.signature(value))  # type: ignore[arg-type]
            except (TypeError, ValueError):
                signature = "(...)"
            if " at 0x" not in signature + text:
                found.append((f"{module_name}.{name}", signature, text))
    return found


def sentence(text: str) -> str:
    """The first paragraph of a docstring, at most 300 characters."""
    return textwrap.shorten(text.split("\n\n")[0], 300, placeholder=" ...")


def docs_chat(form: list[str], entry: tuple[str, str, str]) -> dict[str, Any]:
    """A conversation that looks something up in the documentation."""
    name, signature, text = entry
    values = {"name": name, "signature": name.rsplit(".", 1)[-1] + signature, "first": sentence(text)}
    messages = [
        {"role": "user", "content": form[0].format(**values)},
        calling(form[1].format(**values), call("read_docs", name=name)),
        {"role": "tool", "content": f"{name}{signature}\n\n{text}"},
        {"role": "assistant", "content": form[2].format(**values)},
    ]
    return {"messages": messages, "tools": [READ]}


def compute_chat(language: str, kind: str, rng: random.Random) -> dict[str, Any]:
    """A conversation that computes something with a tool."""
    if kind == "days":
        a, b = (f"{rng.randint(1900, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}" for _ in range(2))
        expression = f"abs((date.fromisoformat('{b}') - date.fromisoformat('{a}')).days)"
    elif kind == "choose":
        a, b = str(rng.randint(2, 9)), str(rng.randint(10, 60))
        expression = f"math.comb({b}, {a})"
    else:
        a, b = str(rng.randint(3, 400)), str(rng.choice([2, 3, 4, 6, 8, 16]))
        expression = f"{a} * 10**9 * {b} // 8"
    value = eval(expression, {"date": datetime.date, "math": math})
    ask, think, answer = COMPUTE[language]
    messages = [
        {"role": "user", "content": ask.format(what=WHAT[kind][language].format(a=a, b=b))},
        calling(think, call("python", expression=expression)),
        {"role": "tool", "content": str(value)},
        {"role": "assistant", "content": answer.format(value=f"{value:,}")},
    ]
    return {"messages": messages, "tools": [RUN]}


def main() -> None:
    """The command line."""
    written, out = Path(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(27)
    entries = documented()
    rng.shuffle(entries)
    forms = itertools.cycle(form for several in DOCS.values() for form in several)
    chats = [docs_chat(next(forms), entry) for entry in entries[:170]]
    chats += [compute_chat(language, kind, rng) for language in COMPUTE for kind in WHAT for _ in range(2)]
    rng.shuffle(chats)
    lines = written.read_text("utf-8").splitlines() + [json.dumps(chat, ensure_ascii=False) for chat in chats]
    out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
