"""Regular expressions of a config.json: Python's own language, in time linear in the name."""

from __future__ import annotations

import random
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mmquant.convert.card import split_card
from mmquant.convert.formats import patterns
from mmquant.convert.formats.patterns import Automaton, compiled
from mmquant.convert.remote_code import code_files
from mmquant.errors import InputError
from mmquant.runs.verify.judge import is_loop

ONES = ("a", "b", ".", "1", "x_", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", "[]a]", r"[\]a]", "{", "}", "-")
PLACES = ("^", "$", r"\b", r"\B", r"\A", r"\Z")
COUNTS = ("*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "??", "{0}", "{,}")
HOSTILE = r"(?:\w+\.?)+(?:.*)*(?:a|a|.)*!"
LONG = "model.layers.61.block_sparse_moe.experts.255.w2" * 4


def random_pattern(chance: random.Random, depth: int) -> str:
    if not depth:
        return chance.choice(ONES + PLACES if chance.random() < 0.3 else ONES)
    inner = [random_pattern(chance, depth - 1) for _ in range(2)]
    named = f"(?P<n{chance.randrange(10**9)}>{inner[0]})"
    forms = (f"({'|'.join(inner)})", f"(?:{inner[0]}){chance.choice(COUNTS)}", "|".join(inner), named, "".join(inner))
    return chance.choice(forms)


@pytest.mark.parametrize("seed", range(4))
def test_names_match_as_in_python(seed: int) -> None:
    chance, compared = random.Random(seed), 0
    while compared < 3000:
        text = random_pattern(chance, chance.randrange(1, 5))
        if chance.random() < 0.1:
            looks = chance.choice(("(?!", "(?="))
            text = f"{chance.choice(('^', ''))}{looks}{random_pattern(chance, 2)}){text}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = re.compile(text)
            except re.error:
                continue
        for _ in range(4):
            name = "".join(chance.choices("ab.1x_-c{", k=chance.randrange(1, 9)))
            for how in ("match", "search"):
                try:
                    found = getattr(compiled(text), how)(name)
                except InputError:  # the next test says of what
                    continue
                assert found == bool(getattr(expected, how)(name)), (text, how, name)
                compared += 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"(a)\1", r"has \1, expected a regular expression without"),
        ("(?i)a", "has flags, or looks around inside"),
        ("a(?=b)", "looks around inside"),
        ("(?<=a)b", "looks around inside"),
        ("(?!a)b|c", "looks around inside"),
        ("a++", "a possessive repetition"),
        ("(?!a)*b", "a repetition of what looks ahead"),
        (r"\x41", r"has \\x"),
        ("a" * 4001, "4,001 characters, expected at most 4,000"),
        ("((((){99}){99}){99}){99}", "more than 2,000 steps"),
        ("(?:.?){3000}", "more than 2,000 steps"),
    ],
)
def test_what_is_not_read_is_named(text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        compiled(text).match("a")
    assert words.replace("\\\\", "\\") in str(error.value).replace("\\\\", "\\")
    assert str(error.value).startswith("config.json: ")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["(", "a{99999999999}", "(" * 1999 + ")" * 1999])
def test_what_is_none_is_none(text: str) -> None:
    with pytest.raises(re.error):
        compiled(text)


def test_a_name_costs_a_step_for_each_character(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    closure = Automaton._closure

    def counted(self: Automaton, state: patterns.State, after: str | None) -> set[int]:
        found = closure(self, state, after)
        steps.append(len(found))
        assert len(found) <= len(self.steps) + 1
        return found

    monkeypatch.setattr(Automaton, "_closure", counted)
    for how in ("match", "search"):
        steps.clear()
        pattern = patterns.Pattern(HOSTILE)
        assert not getattr(pattern, how)(LONG)
        assert len(steps) <= len(LONG) + 1
        first = len(steps)
        assert not getattr(pattern, how)(LONG)
        assert len(steps) == first  # a second time its states are there


def test_states_that_are_many_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "KEPT", 50)
    automaton = patterns.Pattern("(.*e.{9}|.*o.{9})q")
    assert not automaton.match(LONG)
    assert automaton.match("e123456789q")
    assert len(automaton._begins._states) < 50


USES = f"""
import sys
from mmquant.convert.formats import auto_round, gptq_v1, skip_lists
hostile, name = {HOSTILE!r}, {LONG!r}
assert not skip_lists.matches("re:" + hostile, [name])
assert not skip_lists.start_or_end([hostile], [name])
assert not skip_lists.matches_pattern(hostile, [name])
assert not auto_round._found(hostile, (name,))
"""


def test_a_hostile_pattern_ends_wherever_it_stands() -> None:
    """Under a limit of CPU time that Python's `re` would need many times over."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    done = subprocess.run([sys.executable, "-c", USES], preexec_fn=limited, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_other_module_compiles_what_it_read() -> None:
    root = Path(patterns.__file__).parent.parent
    said = [
        p.name
        for p in root.rglob("*.py")
        if re.search(r"\bre\.(compile|match|search)\((pattern|text|entry)\b", p.read_text())
    ]
    assert sorted(said) == ["mixes.py", "patterns.py"]  # --tensor-type REGEX=TYPE is typed, as in llama-quantize


def test_texts_from_outside_do_not_make_our_own_patterns_slow() -> None:
    """A million characters each: what is quadratic in them never ends."""
    many = 10**6
    assert split_card("---\n" + "\n" * many + "x") == ({}, "---\n" + "\n" * many + "x")
    assert split_card("---" + "\n" * many + "\n---" + " " * many + "x")[0] == {}
    assert split_card("---\na: 1\n---\n\n \n  Text\n") == ({"a": 1}, "  Text\n")
    code = {"m.py": b"\n" * many + b"from .n import N\n", "n.py": b" " * many}
    assert set(code_files({"auto_map": {"A": "m.A"}}, code.get)) == {"m.py", "n.py"}
    assert not is_loop("a" * many + "b")
    assert not is_loop("a" * many + " " * many + "b")


@pytest.mark.parametrize("seed", range(3))
def test_a_loop_is_the_same_piece_six_times_over(seed: int) -> None:
    pattern, chance = re.compile(r"(.{2,200}?)\1{5,}\s*\Z", re.DOTALL), random.Random(seed)
    for _ in range(500):
        piece = "".join(chance.choices("ab \n", k=chance.randrange(1, 9)))
        text = (
            "x" * chance.randrange(3) + piece * chance.randrange(9) + chance.choice(("", " ", "\n\n ", "b", piece[:1]))
        )
        assert is_loop(text) == (pattern.search(text) is not None), repr(text)
