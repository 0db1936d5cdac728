"""Draw the figures of the documentation: diagrams as SVG by hand, the plot of quality by bytes with matplotlib.

python docs/figures/draw.py            # writes docs/figures/*.svg; a test holds the diagrams to this
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svg import Figure

HERE = Path(__file__).parent


def house() -> Figure:
    """The packages and what flows through them."""
    f = Figure(760, 300, "A layer's way from the checkpoint to the files")
    f.box(20, 20, 720, 34, "commands: click only        runs: what a command does, callable from Python", "runs")
    f.box(20, 90, 120, 70, "checkpoint\nhub or folder\n230 GB, FP8", "file")
    f.box(180, 90, 130, 70, "convert\none layer at a time\n3.6 GB", "convert")
    f.box(350, 90, 140, 70, "calibration\ntokens through it:\nmoments of 256 experts", "calibration")
    f.box(530, 90, 130, 70, "quantize\ncodes and scales", "quantize")
    f.box(530, 210, 130, 70, "convert\nfiles that appear\nwhole", "convert")
    f.box(350, 210, 140, 70, "check\nKLD to the original,\nlayer by layer", "calibration")
    f.box(180, 210, 130, 70, "mmquant.fit.json\nwhat fits where", "file")
    f.box(20, 210, 120, 70, "hub\nverified upload", "file")
    for left, right in ((140, 180), (310, 350), (490, 530)):
        f.arrow((left, 125), (right - 2, 125))
    f.arrow((595, 160), (595, 208))
    for left, right in ((530, 490), (350, 310), (180, 140)):
        f.arrow((left, 245), (right + 2, 245))
    f.arrow((660, 125), (705, 125), (705, 185), (245, 185), (245, 162), dashed=True)
    f.words(480, 176, "the next layer", 11)
    return f


def convert() -> Figure:
    """How bytes come and go."""
    f = Figure(760, 250, "Shards arrive in verified ranges and leave after their layer")
    f.box(20, 40, 110, 60, "shard on\nthe hub", "file")
    f.box(170, 40, 130, 60, "ranges of 32 MiB\nNAME.part + journal", "convert")
    f.box(340, 40, 120, 60, "SHA-256\nequals the listing's", "convert")
    f.box(500, 40, 110, 60, "shard on disk\n--max-disk", "file")
    f.box(650, 40, 90, 60, "layer l\nin memory", "convert")
    f.box(650, 160, 90, 60, "codes of\nlayer l", "quantize")
    f.box(480, 160, 130, 60, "file with its header\ngrows layer by layer", "convert")
    f.box(310, 160, 130, 60, "fsync, rename:\nthe name means whole", "convert")
    f.box(140, 160, 130, 60, "mmquant.fit.json\nlast of all", "file")
    for a, b in ((130, 168), (300, 338), (460, 498), (610, 648)):
        f.arrow((a, 70), (b, 70))
    f.arrow((695, 100), (695, 158))
    for a, b in ((650, 612), (480, 442), (310, 272)):
        f.arrow((a, 190), (b, 190))
    f.arrow((400, 100), (400, 122), (235, 122), (235, 102), dashed=True)
    f.words(318, 132, "another digest: fetched again", 11)
    f.words(380, 18, "ahead of the layer that needs it; deleted after it", 12)
    return f


def calibration() -> Figure:
    """Which numbers are collected from which tokens."""
    f = Figure(760, 290, "Tokens reach the experts that the router chooses; each expert has sums of its own")
    f.box(20, 110, 110, 70, "text\nwindows of tokens", "file")
    f.box(165, 110, 110, 70, "hidden states\nx, float32", "calibration")
    f.box(310, 110, 90, 70, "router\n8 of 256", "calibration")
    for number, (name, count) in enumerate(
        (("expert 0", "n = 912"), ("expert 1", "n = 3"), ("expert 255", "n = 1,480"))
    ):
        y = 30 + 85 * number
        f.box(440, y, 90, 60, f"{name}\n{count}", "calibration" if number != 1 else "bad")
        f.arrow((400, 145), (438, y + 30))
        f.box(
            570,
            y,
            170,
            60,
            "H = sum of s² x xᵀ\nlargest |x| and sums" if number != 1 else "H leans on the pool\nof all experts",
            "plain",
        )
        f.arrow((530, y + 30), (568, y + 30))
    f.arrow((130, 145), (163, 145))
    f.arrow((275, 145), (308, 145))
    f.words(485, 275, "s: the router's weight of the token for this expert; n: tokens seen (an example)", 12)
    return f


def quantize() -> Figure:
    """Error feedback over the columns of one row."""
    f = Figure(760, 240, "Columns are rounded one after another; those to come absorb the error")
    f.words(60, 40, "row of W", 12, bold=True)
    values = ("0.31", "-1.24", "0.08", "0.77", "-0.42", "1.90", "0.05", "-0.66")
    codes = ("2", "-8", "1")
    for number, value in enumerate(values):
        x = 120 + 76 * number
        kind = "quantize" if number < 3 else "bad" if number == 3 else "plain"
        f.box(x, 22, 70, 36, value, kind)
        if number < 3:
            f.box(x, 100, 70, 36, f"code {codes[number]}", "quantize")
            f.arrow((x + 35, 58), (x + 35, 98))
        if number > 3:
            f.arrow((383, 60), (383, 84), (x + 35, 84), (x + 35, 61))
    f.words(60, 118, "stored", 12, bold=True)
    f.words(560, 104, "error of this column, times the rows of H⁻¹", 12)
    f.box(120, 168, 222, 40, "scale of the group, searched under H", "plain", 12)
    f.box(360, 168, 370, 40, "then: each code or panel once more, all others held (descent)", "plain", 12)
    return f


def runs() -> Figure:
    """One pass, many artifacts."""
    f = Figure(760, 270, "mmquant run reads every layer once for all variants")
    f.box(20, 100, 120, 60, "layer l\nread once,\ndequantized once", "convert")
    f.box(180, 100, 130, 60, "moments and\nstreams, shared", "calibration")
    for number, (name, out) in enumerate(
        (("FP8 block", "fp8/"), ("INT4 g32", "int4/"), ("Q4_K_M", "Q4_K_M/"), ("imatrix", "imatrix.gguf"))
    ):
        y = 20 + 56 * number
        f.box(360, y, 120, 42, name, "quantize")
        f.arrow((310, 130), (358, y + 21))
        f.box(530, y, 110, 42, out, "file")
        f.arrow((480, y + 21), (528, y + 21))
        f.arrow((640, y + 21), (668, 122))
    f.box(670, 95, 78, 60, "check:\nKLD of all", "calibration")
    f.arrow((140, 130), (178, 130))
    f.words(380, 256, "the journal says which steps of which folder are durable: the same command continues", 12)
    return f


def place() -> Figure:
    """What lies where with one card and RAM."""
    f = Figure(760, 190, "IQ3_M on a 24 GB card with 96 GB of RAM: what lies where")
    f.words(70, 48, "card\n23.5 GiB", 12, bold=True)
    f.box(130, 25, 230, 46, "attention, head, experts of\n7 layers: 12.1 GiB", "quantize", 12)
    f.box(360, 25, 150, 46, "KV cache, 32K: 7.8 GiB", "calibration", 12)
    f.box(510, 25, 130, 46, "compute, staging,\nruntime: 1.6 GiB", "plain", 11)
    f.box(640, 25, 90, 46, "free: 2.1", "file", 12)
    f.words(70, 128, "RAM\n90 GiB", 12, bold=True)
    f.box(130, 105, 480, 46, "experts of the first 55 layers (--n-cpu-moe 55), embeddings: 81.1 GiB", "quantize", 12)
    f.box(610, 105, 40, 46, "2.0", "plain", 12)
    f.box(650, 105, 80, 46, "free: 7.0", "file", 12)
    f.words(380, 175, "mmquant fit --target 24GB+96GB --type IQ3_M", 12)
    return f


GGML = (  # a block: its name and bytes, pixels a byte, its fields
    ("Q8_0, 34", 4.2, [("d f16", 2, "convert"), ("32 codes, int8", 32, "quantize")]),
    (
        "Q4_K, 144",
        2.1,
        [
            ("d f16", 2, "convert"),
            ("dmin f16", 2, "convert"),
            ("8 scales, 8 mins: 12", 12, "calibration"),
            ("256 codes of 4 bits: 128", 128, "quantize"),
        ],
    ),
    (
        "Q6_K, 210",
        2.1,
        [
            ("low 4 bits: 128", 128, "quantize"),
            ("high 2 bits: 64", 64, "quantize"),
            ("16 scales, int8", 16, "calibration"),
            ("d f16", 2, "convert"),
        ],
    ),
    (
        "IQ3_XXS, 98",
        2.94,
        [
            ("d f16", 2, "convert"),
            ("64 codebook indices: 64", 64, "quantize"),
            ("signs and scales: 32", 32, "calibration"),
        ],
    ),
    (
        "IQ4_XS, 136",
        2.1,
        [
            ("d f16", 2, "convert"),
            ("high bits of scales: 2", 2, "calibration"),
            ("low bits: 4", 4, "calibration"),
            ("256 codes of 4 bits: 128", 128, "quantize"),
        ],
    ),
)
FOLDERS = (  # a group, likewise
    ("INT4, g32", 16, [("4 words of 8 codes: 16", 16, "quantize"), ("scale BF16: 2", 2, "calibration")]),
    (
        "NVFP4, 16",
        32,
        [
            ("16 E2M1 codes: 8", 8, "quantize"),
            ("E4M3 scale: 1", 1, "calibration"),
            ("one F32 for the matrix", 4, "convert"),
        ],
    ),
    ("MXFP4, 32", 16, [("32 E2M1 codes: 16", 16, "quantize"), ("E8M0 scale: 1", 1, "calibration")]),
    (
        "FP8 tile",
        1.2,
        [("128 x 128 E4M3 codes: 16,384", 300, "quantize"), ("weight_scale_inv F32: 4", 4, "calibration")],
    ),
)


def ggml() -> Figure:
    """Blocks of GGUF types by their bytes."""
    f = Figure(760, 270, "GGUF blocks, byte by byte")
    f.strips(GGML)
    return f


def safetensors() -> Figure:
    """A group of each folder format by its bytes."""
    f = Figure(760, 220, "What a group of weights takes in a folder")
    f.strips(FOLDERS)
    return f


DIAGRAMS: dict[str, Callable[[], Figure]] = {
    "house": house,
    "convert": convert,
    "calibration": calibration,
    "quantize": quantize,
    "runs": runs,
    "place": place,
    "ggml": ggml,
    "safetensors": safetensors,
}


PLACES = {
    "NVFP4": ((7, -6), "left"),
    "INT4-g32": ((-7, -3), "right"),
    "INT4-g128": ((-7, -3), "right"),
    "MXFP4": ((7, -3), "left"),
}  # of names that would meet


def plot(data: Path, out: Path) -> None:
    """Mean KLD by bytes, from what bench/by_bytes.py kept."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mmquant", "font.size": 9}
    rows = json.loads(data.read_text())["rows"]
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for kind, colour in (("GGUF", "#2f6fb3"), ("folders", "#b3622f")):
        chosen = [row for row in rows if ("-" in row["file"] or "FP4" in row["file"]) == (kind == "folders")]
        line = "-" if kind == "GGUF" else "none"
        size = [row["bytes"] / 1e6 for row in chosen]
        others = "llama-quantize with imatrix" if kind == "GGUF" else "to nearest, Four-over-Six, OCP"
        style: dict[str, Any] = {"linestyle": line, "marker": "o", "color": colour}
        axes.plot(size, [row["kld_other"] for row in chosen], mfc="white", alpha=0.6, label=others, **style)
        axes.plot(size, [row["kld"] for row in chosen], label=f"mmquant, {kind}", **style)
        for row, x in zip(chosen, size, strict=True):
            if kind == "folders":
                axes.plot([x, x], [row["kld"], row["kld_other"]], color=colour, linewidth=0.6)
            place, side = PLACES.get(row["file"], ((0, -13), "center"))
            axes.annotate(row["file"], (x, row["kld"]), textcoords="offset points", xytext=place, ha=side, fontsize=7)
    axes.set_yscale("log")
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    axes.set_xlabel("MB of the demo model's file")
    axes.set_ylabel("mean KLD to the original, nats")
    axes.margins(0.08, 0.12)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, draw in DIAGRAMS.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
    if (HERE / "by-bytes.json").exists():
        plot(HERE / "by-bytes.json", folder / "by-bytes.svg")


if __name__ == "__main__":
    main()
