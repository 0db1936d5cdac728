"""Reports stand alone, escape what comes from outside, and are of use without matplotlib."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mmquant.calibration.statistics.report import LayerSummary
from mmquant.runs.reports import evaluation, page, plots
from mmquant.runs.reports.calibration import report
from mmquant.runs.reports.evaluation import M27_PARAMETERS, names_of, write_report

HOSTILE = "<script>alert(1)</script>"
LABELS = (HOSTILE, r"$\frac$", "_hidden", "a\x1b[31m\udcff", "</svg><img src=x>", "模型 & 量化")


class Check(HTMLParser):
    """Every tag is closed, nothing is fetched, ids are unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            fetched = name in ("src", "href", "xlink:href", "action", "srcset") or name.startswith("on")
            assert not fetched or (value or "").startswith(("#", "data:image/png;base64,")), (tag, name, value)
            self.ids += [str(value)] if name == "id" else []
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def candidate(label: str, size: int, parameters: int = 14_438_208, kld: float = 0.1) -> dict[str, Any]:
    numbers = {"kld": {"mean": kld, "mean_ci95": [kld * 0.8, kld * 1.2], "p999": 1.0, "max": 2.0, "p99": 0.5}}
    numbers |= {"ppl": 60.0, "ppl_ratio": 1.01, "ppl_ratio_stderr": 0.01, "ppl_reference": 59.0, "top1": 0.9}
    numbers |= {"nonfinite": 0, "tokens": 100}
    domains = {name: numbers for name in (HOSTILE, "docs")}
    overlap = {name: {"expert_overlap": 0.9 if name == "docs" else None} for name in domains}
    layers = [{"layer": n, "relative_error": 0.01 * n, "expert_overlap": 0.95, "domains": overlap} for n in range(4)]
    size_block = {"label": label, "bytes": size, "bits_per_weight": 8 * size / parameters}
    return {**size_block, **numbers, "domains": domains, "layers": layers}


def document(*candidates: dict[str, Any]) -> dict[str, Any]:
    sample = {"positions": 100, "windows": 4, "context": 64, "stride": 64, "convention": "all", "text": HOSTILE}
    gate = {"passed": False, "thresholds": {"max_kld": 0.1}, "failures": [f"{HOSTILE}: kld 0.2"]}
    document = {"reference": {"label": HOSTILE}, "sample": sample, "gate": gate, "floor": None, "engine": "mmquant"}
    return {**document, "dtype": "float32", "activations": "exact", "candidates": list(candidates)}


def evaluated(path: Path, *candidates: dict[str, Any]) -> str:
    write_report(path / "r.html", document(*candidates))
    return (path / "r.html").read_text("utf-8")


def summary(**changes: Any) -> LayerSummary:
    known = LayerSummary(
        *(0, [5, 0, 3], [[5, 0, 1], [0, 0, 2]], [1], [2], [0], 1, 3.0, 7e4, 7e4, [3], [], 0.01, 0, [1.0, 0.0, 0.5]),
        [0.3, None, 0.5],
        [0.2, None, 0.7],
    )
    return replace(known, **changes)


def calibrated(*layers: LayerSummary) -> str:
    sets = [{"name": HOSTILE, "sha256": "0" * 64, "documents": 1, "windows": 1}]
    description = {"sets": sets, "windows": 1, "context": 16, "seed": 0, "fingerprint": "f" * 64}
    return report(list(layers), (HOSTILE, "b"), description, f"Calibration of {HOSTILE}")


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_hostile_names_stay_text_in_the_evaluation(tmp_path: Path) -> None:
    text = evaluated(tmp_path, *(candidate(label, 10**7 * (i + 1)) for i, label in enumerate(LABELS)))
    check = Check(text)
    assert check.tags.count("svg") == 4
    assert not {"script", "img", "link", "iframe"} & set(check.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    for name in (r"$\frac$", "_hidden", "模型 &amp; 量化"):
        assert text.count(name) >= 4, name  # the table and the legends
    images = [name for name in check.ids if "-image" in name]  # equal colour bars share theirs
    others = [name for name in check.ids if name not in images]
    assert len(others) == len(set(others))


def test_hostile_names_stay_text_in_the_calibration() -> None:
    text = calibrated(summary(), summary(layer=1, overflow=[]))
    check = Check(text)
    assert check.tags.count("svg") == 7
    assert "script" not in check.tags
    assert text.count("&lt;script&gt;") == 4  # title, heading, set, domain
    assert "layer 0: expert 1 saw no token" in text
    assert "nan" not in text.lower().replace("nan on cuda", "")
    silent = calibrated(summary(load=[[5, 0, 1], [0, 0, 0]]))
    assert "<th scope=row>b</th><td>0</td><td>-</td>" in silent


def test_a_page_allows_no_requests_and_follows_the_reader(tmp_path: Path) -> None:
    for text in (evaluated(tmp_path, candidate("a", 10**7)), calibrated(summary())):
        assert "default-src 'none'" in text
        assert '<meta name="viewport" content="width=device-width' in text
        assert "prefers-color-scheme:dark" in text
        assert "currentColor" in text
        assert plots.INK not in text
        assert not re.findall(r"https?://(?!www\.w3\.org/)", text)


def test_without_matplotlib_everything_but_the_plots_is_there(no_matplotlib: None, tmp_path: Path) -> None:
    for text in (evaluated(tmp_path, candidate("a", 10**7)), calibrated(summary())):
        check = Check(text)
        assert "svg" not in check.tags
        assert "figure" not in check.tags
        assert text.count("Plots are missing: matplotlib is not installed, expected pip install") == 1
        assert "<td>" in text


def test_candidates_of_one_name_are_told_apart() -> None:
    found = [candidate(label, 1) for label in ("o/plain/m.gguf", "o/calibrated/m.gguf", "o/other.gguf", "m")]
    assert names_of(found) == ["plain/m.gguf", "calibrated/m.gguf", "other.gguf", "m"]


def test_a_legend_covers_no_line() -> None:
    """It stands beside the axes, and lines that share a colour differ in their stroke."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for index in range(12):
        axes.plot([0, 1], [index, 1], plots.stroke(index), color=plots.colour(index), label=str(index))
    plots.legend(axes)
    figure.draw_without_rendering()
    shown = axes.get_legend()
    assert shown is not None
    assert shown.get_window_extent().x0 >= axes.get_window_extent().x1
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_a_candidate_has_one_colour(tmp_path: Path) -> None:
    text = evaluated(tmp_path, candidate("a", 10**7), candidate("b", 2 * 10**7))
    assert re.findall(r'background:(#\w+)"></i>(\w)', text) == [(plots.colour(0), "a"), (plots.colour(1), "b")]
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    for figure in figures[:3]:
        assert all(plots.colour(i) in figure for i in (0, 1))
        assert plots.colour(2) not in figure
    alone = evaluated(tmp_path, candidate("a", 10**7))
    assert plots.colour(0) in alone
    assert plots.colour(1) not in alone


@pytest.mark.parametrize(
    "sizes", [(12_400_000, 15_000_000), (98_300_000_000, 133_100_000_000), (228_700_000_000,), (5, 3 * 10**12)]
)
def test_ticks_of_sizes_do_not_overlap(sizes: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    seen: list[list[float]] = []

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        del right
        evaluation._distances(left, document(*(candidate("a", size) for size in sizes)), "bytes", 1e-9)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in left.get_xticklabels() if text.get_text()]
        seen.extend([box.x0, box.x1] for box in boxes)

    plots.draw("ticks", "", paint)
    assert len(seen) >= 2
    assert all(before[1] < after[0] for before, after in pairwise(seen))


def test_logarithmic_ticks_are_numbers() -> None:
    for values in ([0.11, 0.19], [0.05, 0.3], [1.0, 1e5]):
        assert "mathdefault" not in plots.lines("l", [0.0, 1.0], {"a": values}, "u", log=True).svg


def test_published_points_stand_beside_their_model_alone(tmp_path: Path) -> None:
    other, own = evaluated(tmp_path, candidate("a", 10**11)), candidate("a", 10**11, M27_PARAMETERS)
    assert "published" not in other
    beside = evaluated(tmp_path, own)
    assert "what others published of MiniMax-M2.7" in beside
    assert "published, by another protocol" in beside


def test_lines_leave_out_what_cannot_be_drawn() -> None:
    nothing = plots.lines("n", [0.0, 1.0], {"a": [float("nan")] * 2}, "u", log=True)
    assert "<svg" in nothing.svg
    for values, points in (([0.0, 10.0], 1), ([1.0, 10.0], 2)):
        drawn = plots.lines("o", [0.0, 1.0], {"a": values}, "u", log=True)
        markers = [tag for tag in re.findall(r"<use[^>]*>", drawn.svg) if plots.colour(0) in tag]
        assert len(markers) == points + 1  # and the legend's


def test_an_empty_evaluation_has_no_plots(tmp_path: Path) -> None:
    text = evaluated(tmp_path)
    Check(text)
    assert page.NO_PLOTS not in text
