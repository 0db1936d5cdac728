"""The result of an evaluation as text: numbers, domains, positions, engines, floors, comparisons."""

from __future__ import annotations

from typing import Any

from mmquant.tables import Size, cell, percent
from mmquant.tables import table as aligned

NUMBERS = ("candidate", "GB", "bits/w", "PPL", "ratio", "+-", "KLD", "95 %", "99.9 %", "top-1 %", "nonfinite")
MOST_PAIRS = 12  # of comparisons that are shown


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each candidate, then each domain, then the layer that loses most."""
    sample, lines = result["sample"], []
    lines.append(f"reference {cell(result['reference']['label'])}: PPL {cell(_reference_ppl(result))}")
    scored = f"{sample['positions']} positions in {sample['windows']} windows of {sample['context']}"
    kind = result["dtype"] if result["activations"] == "exact" else f"activations of {result['activations']}"
    lines.append(f"{scored} ({sample['convention']}), engine {result['engine']}, {kind}; GB of weights")
    rows = [row for candidate in result["candidates"] for row in _rows(candidate)]
    lines += aligned(NUMBERS, [*rows, *(_row(floor) for floor in _floors(result))], text=("candidate",))
    domains = [
        (c["label"], name, d["ppl"], d["kld"]["mean"], percent(d["top1"], 3))
        for c in result["candidates"]
        for name, d in c["domains"].items()
        if len(c["domains"]) > 1 and d["tokens"]
    ]
    if domains:
        lines += ["", *aligned(("candidate", "domain", "PPL", "KLD", "top-1 %"), domains, text=("candidate", "domain"))]
    lines += position_lines(result)
    for candidate in result["candidates"]:
        lines += _worst_layer(candidate)
    lines += [*floor_lines(result), *pair_lines(result), *claim_lines(result)]
    if "engine_check" in result:
        lines += ["", *_engine_lines(result["engine_check"])]
    return "\n".join(lines)


def _rows(candidate: dict[str, Any]) -> list[tuple[object, ...]]:
    """The candidate, and under it the same as engines compute it."""
    likes = candidate.get("engine_like", ())
    exact = {**candidate, "label": f"{candidate['label']} (exact)"} if likes else candidate
    rows = [_row(exact)]
    for like in likes:
        rows.append(_row({**like, "label": f"{candidate['label']} ({like['profile']})"}))
    return rows


def _floors(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result.get("floors") or [*filter(None, [result.get("floor")])]


def position_lines(result: dict[str, Any]) -> list[str]:
    """By position in the window, where more than one range was scored."""
    rows = []
    for c in result["candidates"]:
        for block in c.get("positions", ()):
            if block["tokens"] and len(c["positions"]) > 1:
                overlap = None if block["expert_overlap"] is None else f"{block['expert_overlap']:.4f}"
                where = f"{block['from']}-{block['to']}"
                rows.append((c["label"], where, block["tokens"], block["kld"], percent(block["top1"], 3), overlap))
    head = ("candidate", "position", "scored", "KLD", "top-1 %", "experts")
    return ["", *aligned(head, rows, text=("candidate", "position"))] if rows else []


def floor_lines(result: dict[str, Any]) -> list[str]:
    """What differs beyond the noise floor."""
    rows = [
        (c["label"], row["number"], row["value"], row["floor"], "yes" if row["beyond"] else "no")
        for c in result["candidates"]
        for row in c.get("beyond_floor", ())
    ]
    head = ("candidate", "number", "value", "floor", "beyond")
    text = ("candidate", "number", "beyond")
    return ["", "what differs beyond the noise floor:", *aligned(head, rows, text=text)] if rows else []


def pair_lines(result: dict[str, Any]) -> list[str]:
    """Pairs of candidates on the same positions."""
    pairs = [pair for pair in result.get("comparisons", ()) if "kld" in pair][:MOST_PAIRS]
    rows = [_pair_row(pair, pair["verdict"]) for pair in pairs]
    head = ("first", "second", "KLD first - second", "95 %", "p", "first is")
    return ["", *aligned(head, rows, text=("first", "second", "first is"))] if rows else []


def claim_lines(result: dict[str, Any]) -> list[str]:
    """Claims of --better-than: which hold."""
    rows = [_pair_row(claim, "holds" if claim["holds"] else "refused") for claim in result.get("claims", ())]
    head = ("claim: this", "is better than", "KLD difference", "95 %", "p", "claim")
    return ["", *aligned(head, rows, text=("claim: this", "is better than", "claim"))] if rows else []


def _pair_row(pair: dict[str, Any], last: str) -> tuple[object, ...]:
    if "kld" not in pair:
        return (pair["first"], pair["second"], None, None, None, last)
    kld = pair["kld"]
    low, high = kld["ci95"]
    return (pair["first"], pair["second"], kld["difference"], f"{cell(low)}..{cell(high)}", kld["p"], last)


def _worst_layer(candidate: dict[str, Any]) -> list[str]:
    layers = [layer for layer in candidate["layers"] if layer["relative_error"] is not None]
    if not layers:
        return []
    errors = [0.0, *(layer["relative_error"] for layer in layers)]
    worst = max(range(len(layers)), key=lambda i: errors[i + 1] - errors[i])
    last = layers[-1]
    text = f"{cell(candidate['label'])}: hidden state {last['relative_error']:.3g} off after the last layer, "
    text += f"most added by layer {layers[worst]['layer']}"
    known = [layer for layer in layers if layer["expert_overlap"] is not None]  # a pruned model's have other numbers
    if not known:
        return [text]
    overlap = min(known, key=lambda layer: layer["expert_overlap"])
    return [f"{text}; experts agree least in layer {overlap['layer']} ({overlap['expert_overlap']:.4f})"]


def _engine_lines(check: dict[str, Any]) -> list[str]:
    rows = []
    for c in check["candidates"]:
        off = c["difference"]
        numbers = (c["ppl"], c["kld"]["mean"], c["kld"]["p999"], percent(c["top1"], 3))
        seconds = f"{sum(c['seconds'].values()):.0f}" if "seconds" in c else None
        rows.append((c["label"], *numbers, percent(off["ppl"], 3), off["kld_mean_nats"], seconds))
    head = ("candidate", "PPL", "KLD", "99.9 %", "top-1 %", "PPL off %", "KLD off", "s")
    by = f"by {check['engine']} {check['version']}, reference by {check['reference']}:"
    return [by, *aligned(head, rows, text=("candidate",))]


def _reference_ppl(result: dict[str, Any]) -> float | None:
    return result["candidates"][0]["ppl_reference"] if result["candidates"] else None


def _row(c: dict[str, Any]) -> tuple[object, ...]:
    kld, interval = c["kld"], c["kld"]["mean_ci95"]
    return (
        c["label"],
        Size(c["bytes"]) if "bytes" in c else None,
        f"{c['bits_per_weight']:.3f}" if "bits_per_weight" in c else None,
        *(c["ppl"], c["ppl_ratio"], c["ppl_ratio_stderr"], kld["mean"]),
        f"{cell(interval[0])}..{cell(interval[1])}" if interval else None,
        kld["p999"],
        percent(c["top1"], 3),
        c["nonfinite"],
    )
