"""Tables: aligned, never wider than 80 columns, nothing lost."""

from __future__ import annotations

import unicodedata
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mmquant.tables import NARROW, WIDTH, Size, cell, markdown, percent, table

LABEL = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp", "Mn", "Mc", "Me", "Cf", "Cn", "Co"]), max_size=70
)
ROWS = st.lists(st.tuples(LABEL, st.integers(0, 10**12), st.floats(allow_nan=False), LABEL), min_size=1, max_size=4)


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def test_values_are_shown_by_their_kind() -> None:
    assert [cell(v) for v in (None, True, 1234567, 0.123456, "a\nb\x1b")] == [
        "-",
        "True",
        "1,234,567",
        "0.12346",
        "a\ufffdb\ufffd",
    ]
    assert cell(Size(228_700_000_000)) == "228.700"
    assert (percent(0.1234567), percent(None), percent(1.0, 0)) == ("12.35", "-", "100")


def test_words_are_left_numbers_right_and_sizes_share_their_decimals() -> None:
    assert table(("kind", "GB"), [("a", Size(5_000_000)), ("long", Size(12_345_678_901))], text=("kind",)) == [
        "kind      GB",
        "a      0.005",
        "long  12.346",
    ]
    assert table(("kind", "GB"), [("a", Size(15_543_232))])[1] == "   a  0.01554"
    assert table(("kind",), []) == ["kind"]


@given(ROWS)
def test_no_line_is_wide_and_nothing_is_lost(rows: list[tuple[str, int, float, str]]) -> None:
    lines = table(("name", "count", "value", "notes"), rows, text=("name", "notes"))
    assert max(map(columns, lines)) <= WIDTH
    joined = "".join("".join(lines).split())
    assert all(cell(value) in joined for row in rows for value in row[1:3])
    assert not Counter("".join(cell(value) for row in rows for value in row)) - Counter(joined)


def test_wrapped_words_keep_their_column() -> None:
    lines = table(("name", "notes", "n"), [("x" * 50, "some words " * 8, 7)], text=("name", "notes"))
    at = lines[0].index("notes")
    assert all(line[at - 2 : at] in ("  ", "") for line in lines)
    assert "".join(line[:at].strip() for line in lines[1:]) == "x" * 50
    assert (
        " ".join(" ".join(line[at:].split()) for line in lines[1:]).replace(" 7", "").split() == ["some", "words"] * 8
    )
    assert sum("7" in line for line in lines) == 1


def test_too_many_numbers_continue_below_beside_the_first_column() -> None:
    head = ("candidate", *(f"number {i}" for i in range(12)))
    lines = table(head, [("a/long/path/of/a/candidate", *range(12))], text=("candidate",))
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("candidate") for line in lines) == lines.count("") + 1 >= 2
    values = [word for line in lines for word in line.split() if word.isdigit()]
    assert {str(i) for i in range(12)} <= set(values)
    assert NARROW < len("a/long/path/of/a/candidate")


def test_a_markdown_cell_stays_in_its_place() -> None:
    assert markdown(["a", "b"], [["x|y\nz", Size(10**9)]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y\ufffdz | 1.000 |",
    ]
