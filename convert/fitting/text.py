"""FIT.md: what a manifest says of machines, for people. Made of the manifest alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from mmquant.tables import GIB, gib, markdown

FIT_TEXT = "FIT.md"
REPORT = "mmquant.report.html"  # the same with plots and commands to copy, as push and `mmquant report` write it
MARK = {"yes": "yes", "tight": "tight (under 1 GiB free)", "no": "no"}


def fit_text(manifest: Mapping[str, Any]) -> str:
    """Per artifact one table of machines, then the commands of those it fits."""
    parts = ["# What runs where", INTRO]
    for artifact in manifest["artifacts"]:
        own = [t for t in manifest["targets"] if t["artifact"] == artifact["id"]]
        total = artifact["weights"]["total"]
        bits = artifact.get("bits_per_weight")
        size = f"{total / 1e9:.1f} GB" + (f", {bits:.2f} bits per weight" if isinstance(bits, int | float) else "")
        parts += [f"## {artifact['id']}", f"{size}.", machines(own)]
        parts += [commands_of(target) for target in own if target["fits"] != "no"]
    return "\n\n".join(parts) + "\n"


INTRO = (
    "Computed, not run: weights exact, KV cache by the engines' arithmetic, the rest estimated. Context: the largest "
    "of 8K, 16K, 32K, 64K, 96K, 128K, 192K that leaves 1 GiB free on each device. Speed: an upper bound by memory "
    "bandwidth alone."
)


def machine_words(target: Mapping[str, Any]) -> str:
    """Cards and RAM of a target, which no table may leave out."""
    hardware = target["hardware"]
    ram = f"{hardware['host_ram'] / GIB:.0f} GiB"
    if hardware.get("unified"):
        return f"{ram} unified"
    cards = [f"{gpu['count']} x {gpu['name']}" for gpu in hardware["gpus"]]
    return " + ".join([*cards, f"{ram} RAM"])


def placement_words(target: Mapping[str, Any]) -> str:
    """The placement in an engine's own options."""
    place = target.get("placement", {})
    words = [f"TP {place['tensor_parallel']}"] if "tensor_parallel" in place else []
    words += ["EP"] if place.get("expert_parallel") else []
    words += [f"--n-cpu-moe {place['n_cpu_moe']}"] if place.get("n_cpu_moe") else []
    words += ["-ts " + ",".join(map(str, place["tensor_split"]))] if place.get("tensor_split") else []
    return " ".join(words) or "-"


def machines(targets: list[Mapping[str, Any]]) -> str:
    """One row a machine."""
    rows: list[list[str]] = []
    for target in targets:
        fits = target["fits"]
        context, speed = (f"{target['context_tokens']:,}", f"{target.get('tokens_per_second_bound', 0):.0f}")
        lacks = target.get("reason") or f"{gib(target.get('missing', 0))} missing"
        cells = [context, speed, placement_words(target)] if fits != "no" else ["-", "-", lacks]
        rows.append([target["id"], machine_words(target), MARK[fits], *cells])
    return markdown(["machine", "memory", "fits", "context", "tok/s <=", "placement"], rows)


def commands_of(target: Mapping[str, Any]) -> str:
    """The commands of one machine as a block."""
    lines = [command_line(target["launch"])]
    for other in target.get("alternatives", []):
        note = f" ({other['note']})" if other.get("note") else ""
        lines += [f"# {other['engine']}{note}", command_line(other)]
    text = "\n".join(lines)
    return f"### {target['id']}\n\n```sh\n# {target['engine']}\n{text}\n```"


def command_line(launch: Mapping[str, Any]) -> str:
    """A launch as it is typed; a script without the shell that would run it."""
    if launch["argv"][:2] == ["sh", "-c"]:
        return str(launch["argv"][2])
    environment = [f"{key}={shlex.quote(value)}" for key, value in sorted(launch.get("env", {}).items())]
    return " ".join([*environment, shlex.join(launch["argv"])])
