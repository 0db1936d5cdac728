"""Keep a result of `mmquant verify`: in an artifact's manifest, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmquant.errors import InputError
from mmquant.tables import percent

from ...convert.files.lock import hold
from ...convert.manifest import MANIFEST, QUALITY_WAIT, read, write
from ..reports.page import Grid, Part, Section, Text, render
from ..reports.page import write as write_page
from .score import PUBLISHED


def check_folder(folder: Path) -> None:
    """InputError unless the folder holds a finished artifact."""
    if read(folder) is None:
        raise InputError(f"--record {folder}: {MANIFEST} is missing, expected a finished artifact")


def put(folder: Path, document: dict[str, Any]) -> None:
    """Put the rates into the manifest of a folder, as `behaviour` of its artifacts; the card shows them."""
    kept = {key: document[key] for key in ("generated", "run", "rates", "missed")}
    with hold(folder, wait=QUALITY_WAIT):
        manifest = read(folder)
        if manifest is None:
            raise InputError(f"--record {folder}: {MANIFEST} is missing, expected a finished artifact")
        for artifact in manifest["artifacts"]:
            artifact["behaviour"] = kept
        write(folder, manifest)


def write_html(path: Path, document: dict[str, Any]) -> None:
    """A page of one result; it appears whole."""
    run, compared = document["run"], document["comparison"]
    said = f"{run['prompts']} prompts, {run['loops']} times each, sampling {run['sampling']}."
    lead: list[Part] = [Text(said), *(Text(f"Beyond MiniMax's limits: {line}", "fail") for line in document["missed"])]
    sections = [Section("Rates", [_rates(document["rates"]), Text(_published(document), "note")])]
    by_language = [(name, *_shares(found)) for name, found in document["by_language"].items()]
    sections.append(Section("By language", [Grid(("language", *document["rates"]), by_language, label="by language")]))
    if compared is not None:
        rows = [(n, r["ours_alone"], r["reference_alone"], f"{r['p']:.3g}") for n, r in compared["rates"].items()]
        similar = f"{compared['pairs']} pairs, trigger similarity {percent(compared['trigger_similarity'])} %."
        grid = Grid(("rate", "here alone", "there alone", "p"), rows, label="comparison")
        sections.append(Section(f"Against {compared['url']}", [Text(similar), grid]))
        differ = ", ".join(compared["different"]) or "none"
        sections.append(Section("Prompts with different verdicts", [Text(differ)]))
    write_page(path, render(f"{run['model']} at {run['url']}", lead, sections))


def _rates(rates: dict[str, Any]) -> Grid:
    rows = [(n, percent(r["rate"]), _ends(r["ci95"]), r["of"], percent(PUBLISHED.get(n))) for n, r in rates.items()]
    return Grid(("rate", "%", "95 %", "of", "MiniMax's %"), rows, label="rates")


def _ends(ends: list[float] | None) -> str | None:
    return f"{100 * ends[0]:.1f} .. {100 * ends[1]:.1f}" if ends else None


def _shares(found: dict[str, Any]) -> list[str]:
    return [percent(r["rate"]) for r in found.values()]


def _published(document: dict[str, Any]) -> str:
    published = document["published"]
    return f"MiniMax's figures: {published['what']}; {published['source']}."
