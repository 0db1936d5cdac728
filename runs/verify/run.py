"""Ask every prompt of a server, and of a second one to compare with; keep the answers as they come."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmquant import __version__
from mmquant.errors import GateError, InputError, MmquantError
from mmquant.monitor import Monitor, current, watching
from mmquant.tables import percent, table

from ...convert.files.atomic import append_line, write_whole
from ...convert.files.lock import hold
from ...convert.files.parse import is_list, is_object
from ...convert.hub.prefetch import DaemonPool
from ..options_use import VerifyOptions
from ..results import Result
from .client import AskError, Server, base_url, find_model
from .judge import Reply, Verdict, judge
from .prompts import Case, fingerprint, read_prompts
from .score import KNOWN, PUBLISHED, compare, missed, rates

SAMPLING = dict(KNOWN.sampling)
ANSWERS = "answers.jsonl"
PAUSE = 1.0  # seconds before a second try; doubled for each further one


@dataclass(frozen=True)
class Verified(Result):
    """The result document (mmquant-verify-1.schema.json)."""

    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        return self.document

    def rows(self) -> list[dict[str, Any]]:
        """One row for each rate."""
        published = PUBLISHED
        return [{"rate": n, **found, "minimax": published.get(n)} for n, found in self.document["rates"].items()]

    def lines(self) -> list[str]:
        """The same for people."""
        run = self.document["run"]
        head = f"{run['model']} at {run['url']}: {run['prompts']} prompts, {run['loops']} times"
        rows = [_row(name, found) for name, found in self.document["rates"].items()]
        lines = [head, *table(("rate", "%", "95 %", "of", "MiniMax's %"), rows, text=("rate",))]
        if compared := self.document["comparison"]:
            similar = percent(compared["trigger_similarity"])
            lines += ["", f"against {compared['url']}: {compared['pairs']} pairs, trigger similarity {similar} %"]
            pairs = [(n, r["ours_alone"], r["reference_alone"], f"{r['p']:.3g}") for n, r in compared["rates"].items()]
            lines += table(("rate", "here alone", "there alone", "p"), pairs, text=("rate",))
        return [*lines, *(f"beyond MiniMax's limits: {line}" for line in self.document["missed"])]

    def check(self) -> None:
        """GateError when a rate is beyond what MiniMax calls right."""
        if self.document["missed"]:
            raise GateError("; ".join(self.document["missed"]))


def _row(name: str, found: dict[str, Any]) -> tuple[object, ...]:
    ends = found["ci95"]
    shown = f"{100 * ends[0]:.1f} .. {100 * ends[1]:.1f}" if ends else None
    return name, percent(found["rate"]), shown, found["of"], percent(PUBLISHED.get(name))


def verify(url: str, options: VerifyOptions | None = None, *, monitor: Monitor | None = None) -> Verified:
    """Measure what agents need of a server: tool calls, their arguments, thinking, language, repetition.

    url: an OpenAI-compatible server, http://HOST:PORT or https://HOST/v1. The prompts are mmquant's own in ten
    languages, the rates those of MiniMax-Provider-Verifier. Raises InputError when the server names no model or refuses
    the key, MmquantError when it cannot be reached or gives no request an answer.
    """
    chosen = options or VerifyOptions()
    cases = read_prompts(chosen.prompts, chosen.language)
    if chosen.state is not None and chosen.state.exists() and not chosen.state.is_dir():
        raise InputError(f"--state {chosen.state}: a file, expected a folder")
    with watching(monitor):
        server = _server(url, chosen, chosen.served_model)
        other = _server(chosen.against, chosen, None) if chosen.against is not None else None
        ours = _asked(server, cases, chosen, "")
        theirs = _asked(other, cases, chosen, "against-") if other is not None else None
    return Verified(_document(server, cases, chosen, ours, (other, theirs) if other and theirs is not None else None))


def _server(url: str, options: VerifyOptions, model: str | None) -> Server:
    where, key = base_url(url), os.environ.get(options.key_variable, "")
    return Server(where, model or find_model(where, key), key, float(options.timeout), options.stream)


Verdicts = dict[str, Verdict | None]


def _asked(server: Server, cases: Sequence[Case], options: VerifyOptions, prefix: str) -> Verdicts:
    """The verdicts on all prompts and loops by key; what an earlier run has kept is not asked again."""
    if options.state is None:
        return _ask_all(server, cases, options, {}, None)
    with hold(options.state):
        path = options.state / f"{prefix}{ANSWERS}"
        run = {"url": server.url, "model": server.model, "prompts": fingerprint(tuple(cases))}
        run |= {"stream": options.stream, "max_tokens": options.max_tokens}
        return _ask_all(server, cases, options, _kept(path, run), path)


def _kept(path: Path, run: dict[str, Any]) -> dict[str, Reply]:
    """Answers of an earlier run. A last line that was cut off is left out. InputError for another run's folder."""
    if not path.is_file():
        write_whole(path, (json.dumps(run) + "\n").encode())
        return {}
    lines = path.read_text("utf-8", "replace").splitlines()
    rows = [row for line in lines if is_object(row := _parsed(line))]
    if not rows or rows[0] != run:
        raise InputError(f"{path}: answers of another server, model or set of prompts; expected an empty folder")
    if not path.read_bytes().endswith(b"\n"):
        append_line(path, "")  # ends the line that was cut off
    return {str(row["key"]): reply for row in rows[1:] if "key" in row and (reply := _reply(row.get("reply")))}


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _reply(found: object) -> Reply | None:
    if not is_object(found) or set(found) != {"content", "reasoning", "calls", "finish"}:
        return None
    calls: object = found["calls"]
    pairs = calls if is_list(calls) else []
    if not all(is_list(pair) and len(pair) == 2 for pair in pairs):
        return None
    said = tuple((str(pair[0]), str(pair[1])) for pair in pairs)
    return Reply(str(found["content"]), str(found["reasoning"]), said, str(found["finish"]))


def _ask_all(
    server: Server, cases: Sequence[Case], options: VerifyOptions, kept: dict[str, Reply], path: Path | None
) -> Verdicts:
    keys = {f"{case.id}#{loop}": case for loop in range(options.loops) for case in cases}
    verdicts: Verdicts = {key: judge(case, kept[key]) for key, case in keys.items() if key in kept}
    missing = [key for key in keys if key not in verdicts]
    bar = current().start(f"verify {server.model}", len(keys), "prompt", len(verdicts))
    faults: list[str] = []
    writing, stop = threading.Lock(), threading.Event()

    def one(key: str) -> tuple[str, Reply | None]:
        reply, fault = _ask(server, keys[key], options, stop)
        if reply is None:
            faults.append(fault)
        elif path is not None:
            with writing:
                append_line(path, json.dumps({"key": key, "reply": asdict(reply)}))
        return key, reply

    pool = DaemonPool(options.concurrency)
    try:
        for future in as_completed([pool.submit(one, key) for key in missing]):
            key, reply = future.result()
            verdicts[key] = None if reply is None else judge(keys[key], reply)
            bar.advance()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        bar.finish()
    if faults and all(verdict is None for verdict in verdicts.values()):
        raise MmquantError(f"{server.url}: no request was answered; the last said: {faults[-1]}")
    if faults:
        current().message(f"{len(faults)} of {len(keys)} requests got no answer; one said: {faults[0]}")
    return {key: verdicts[key] for key in keys}


def _ask(server: Server, case: Case, options: VerifyOptions, stop: threading.Event) -> tuple[Reply | None, str]:
    """The reply, or why there is none after all tries."""
    body = {**case.body(), **SAMPLING, "max_tokens": options.max_tokens}
    fault = ""
    for attempt in range(options.retries + 1):
        try:
            return server.ask(body), ""
        except AskError as error:
            fault = str(error)
            if not error.again or stop.wait(PAUSE * 2**attempt if attempt < options.retries else 0.0):
                break
    return None, fault


def _document(
    server: Server,
    cases: Sequence[Case],
    options: VerifyOptions,
    ours: Verdicts,
    other: tuple[Server, Verdicts] | None,
) -> dict[str, Any]:
    found = rates(list(ours.values()))
    run = {"url": server.url, "model": server.model, "prompts": len(cases), "prompts_sha256": fingerprint(tuple(cases))}
    run |= {"loops": options.loops, "stream": options.stream, "max_tokens": options.max_tokens, "sampling": SAMPLING}
    comparison = None
    if other is not None:
        comparison = {"url": other[0].url, "model": other[0].model, "rates_there": rates(list(other[1].values()))}
        comparison |= compare(ours, other[1])
    languages = sorted({case.id.split("/")[0] for case in cases})
    return {
        "schema": "mmquant-verify",
        "schema_version": "1.0",
        "generated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "generator": {"name": "mmquant", "version": __version__},
        "run": run,
        "rates": found,
        "by_language": {name: rates([v for k, v in ours.items() if k.startswith(f"{name}/")]) for name in languages},
        "missed": missed(found),
        "published": {"source": KNOWN.agents_source, "what": KNOWN.agents_of, "rates": dict(PUBLISHED)},
        "prompts": {key: None if verdict is None else asdict(verdict) for key, verdict in ours.items()},
        "comparison": comparison,
    }
