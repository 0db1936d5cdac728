"""The table of a run on several ranks beside the run on one."""

from __future__ import annotations

from typing import Any

import _path  # noqa: F401

from mmquant.convert.models.geometry import Geometry


def report(one: dict[str, Any], run: dict[str, Any], g: Geometry) -> None:
    """The table of a run beside the first, `one`."""
    size, names = run["ranks"], list(run["stages"][0])
    print(f"\n{size} rank{'s' if size > 1 else ''}")
    print(
        f"{'stage of one layer':38} {'slowest':>8} {'fastest':>8} {'effic.':>6} {'moving':>7} {'waiting':>8}",
        end="",
    )
    print(f" {'sent GB':>8} {'least':>7}")
    least = least_bytes(g, size)
    for name in names:
        rows = [stages[name] for stages in run["stages"]]
        slowest, inside = max(row[0] for row in rows), [row[1] for row in rows]
        base = max(stages[name][0] for stages in one["stages"])
        gain = f"{base / size / slowest:6.0%}" if size > one["ranks"] and slowest > 0 else "     -"
        bound = next((f"{v / 1e9:7.2f}" for part, v in least.items() if part in name), "      -")
        print(f"{name:38} {slowest:8.3f} {min(row[0] for row in rows):8.3f} {gain} {min(inside):7.3f}", end="")
        print(f" {max(inside) - min(inside):8.3f} {sum(row[2] for row in rows) / 1e9:8.2f} {bound}")
    memory = [f"{rss / 1e9:.1f}/{pss / 1e9:.1f}/{device / 1e9:.1f}" for (rss, pss), device in run["memory"]]
    print(f"GB of a rank, RSS/PSS/most on its device: {', '.join(memory)}; {run['seconds']:.0f} s in all")
    if run is not one:
        compare(one, run)


def least_bytes(g: Geometry, size: int) -> dict[str, float]:
    """Bytes that must be sent between ranks, by what the stage's name holds: each once, to who needs it.

    A layer's weights in bfloat16 to every rank, each rank's sums to their owners, INT4 codes (a byte each) and scales
    to the first rank.
    """
    matrices = 3.0 * g.experts * g.hidden * g.expert_width
    attention = g.hidden * g.head_dim * 2 * (g.heads + g.kv_heads)
    sums = 4.0 * g.experts * (g.hidden**2 + g.expert_width**2)
    results = matrices * (1 + 4 / 128) * (size - 1) / size
    return {
        "weights": 2 * (matrices + attention) * (size - 1),
        "calibrate: sums": sums * (size - 1),
        "int4: sol": results,
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, values in one["results"].items():
        pairs = zip(values, other["results"][name], strict=True)
        apart = max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)
        shown = " ".join(f"{value:.6g}" for value in other["results"][name])
        print(f"result {name}: {shown}; {apart:.2e} from one rank's")
