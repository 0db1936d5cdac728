"""Match regular expressions of a config.json in time linear in the name: they come from outside.

Python's `re` backtracks, exponentially where a pattern wants it. A pattern becomes an automaton here, whose states are
made when a name first needs them. Back-references, flags and looking around inside a pattern are refused: engines'
configurations do without. At a pattern's start `(?!...)` and `(?=...)` are read.
Source: Thompson, Regular Expression Search Algorithm, CACM 11 (1968).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import cache, cached_property

from mmquant.errors import InputError

from ..files.parse import short
from .pattern_syntax import LOOKS, Node, Reader

LONGEST, LARGEST = 4000, 2000  # characters of a pattern; steps of its automaton, repetitions written out
KEPT = 1 << 20  # places in all states that an automaton remembers
START, WORD, OTHER = "start", "word", "other"  # what stands before a place
ACCEPT, END = -1, ""
_WORD = re.compile(r"\w")


@dataclass
class State:
    """Places that a name may have reached, and where each character leads; None: nowhere, True: it matches."""

    places: frozenset[int]
    before: str
    moves: dict[str, State | bool | None] = field(default_factory=dict[str, "State | bool | None"])


class Automaton:
    """A pattern that begins a name, or with `anywhere` lies in it."""

    def __init__(self, pattern: str, node: Node, anywhere: bool) -> None:
        self.pattern, self.anywhere = pattern, anywhere
        self.steps: list[tuple[str, str, tuple[int, ...]]] = []  # kind, text, places behind it
        self.budget, self._states, self._size = LARGEST, dict[tuple[frozenset[int], str], State](), 0
        self.start = frozenset({self._add(node, ACCEPT)})

    def matches(self, name: str) -> bool:
        """Whether it does."""
        state = self._state(self.start, START)
        for letter in name:
            if letter not in state.moves:
                state.moves[letter] = self._move(state, letter)
            found = state.moves[letter]
            if found is None or found is True:
                return bool(found)
            assert isinstance(found, State)
            state = found
        if END not in state.moves:
            state.moves[END] = ACCEPT in self._closure(state, None)
        return bool(state.moves[END])

    def _add(self, node: Node, behind: int) -> int:
        """The place where a node begins that goes on at `behind`."""
        self.budget -= 1
        if self.budget < 0:
            raise InputError(f"config.json: {short(self.pattern)}: more than {LARGEST:,} steps of a regular expression")
        if node.kind in ("one", "at"):
            return self._step(node.kind, node.text, (behind,))
        if node.kind == "or":
            return self._step("split", "", tuple(self._add(part, behind) for part in node.parts))
        if node.kind == "cat":
            for part in reversed(node.parts):
                behind = self._add(part, behind)
            return behind
        return self._repeat(node, behind)

    def _repeat(self, node: Node, behind: int) -> int:
        (inner,) = node.parts
        if node.most is None:
            loop = self._step("split", "", ())
            self.steps[loop] = ("split", "", (self._add(inner, loop), behind))
            behind = loop
        else:
            end = behind
            for _ in range(node.most - node.least):
                behind = self._step("split", "", (self._add(inner, behind), end))
        for _ in range(node.least):
            behind = self._add(inner, behind)
        return behind

    def _step(self, kind: str, text: str, behind: tuple[int, ...]) -> int:
        self.steps.append((kind, text, behind))
        return len(self.steps) - 1

    def _state(self, places: frozenset[int], before: str) -> State:
        key = places, before
        if key not in self._states:
            self._size += len(places) + 1
            if self._size > KEPT:
                self._states, self._size = {}, len(places) + 1
            self._states[key] = State(places, before)
        return self._states[key]

    def _move(self, state: State, letter: str) -> State | bool | None:
        reached = self._closure(state, letter)
        if ACCEPT in reached:
            return True
        places = {place for at in reached for place in self._behind(at, letter)}
        if self.anywhere:
            places |= self.start
        return self._state(frozenset(places), kind_of(letter)) if places else None

    def _behind(self, at: int, letter: str) -> tuple[int, ...]:
        kind, text, behind = self.steps[at]
        return behind if kind == "one" and one_letter(text).fullmatch(letter) else ()

    def _closure(self, state: State, after: str | None) -> set[int]:
        """All places that are reached without a character; `after`: the next one, None at the name's end."""
        reached, waiting = set[int](), list(state.places)
        while waiting:
            at = waiting.pop()
            if at in reached:
                continue
            reached.add(at)
            if at == ACCEPT:
                continue
            kind, text, behind = self.steps[at]
            if kind == "split" or (kind == "at" and holds(text, state.before, after)):
                waiting += behind
        return reached


class Pattern:
    """A regular expression of config.json. Names are not empty and hold no line breaks."""

    def __init__(self, text: str) -> None:
        reader = Reader(text)
        self._text, self._anchored, looks = text, reader.takes("^"), list(reader.looks())
        reader.at = reader.at if looks else 0
        self._node = reader.either()
        if looks and self._node.kind == "or":
            raise reader.fault(LOOKS)
        self._looks = [(wanted, Automaton(text, node, False)) for wanted, node in looks]

    def match(self, name: str) -> bool:
        """Whether it begins the name."""
        return all(look.matches(name) == wanted for wanted, look in self._looks) and self._begins.matches(name)

    def search(self, name: str) -> bool:
        """Whether it lies in the name."""
        if not self._looks:
            return self._lies.matches(name)
        if not self._anchored:
            raise Reader(self._text).fault(LOOKS)
        return self.match(name)

    @cached_property
    def _begins(self) -> Automaton:
        return Automaton(self._text, self._node, False)

    @cached_property
    def _lies(self) -> Automaton:
        return Automaton(self._text, self._node, True)


def holds(assertion: str, before: str, after: str | None) -> bool:
    """Whether an assertion holds between two characters."""
    if assertion in "AZ":
        return before == START if assertion == "A" else after is None
    edge = (before == WORD) != (after is not None and kind_of(after) == WORD)
    return edge == (assertion == "b")


@cache
def kind_of(letter: str) -> str:
    """WORD or OTHER."""
    return WORD if _WORD.fullmatch(letter) else OTHER


@cache
def one_letter(text: str) -> re.Pattern[str]:
    """A part of a pattern that is one character."""
    return quietly(text)


def quietly(text: str) -> re.Pattern[str]:
    """A pattern as Python has it, without its warnings of what it might mean one day. re.error for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return re.compile(text)
        except (OverflowError, RecursionError) as error:  # a{99999999999}, or a thousand brackets
            raise re.error(str(error)) from None


@cache
def compiled(text: str) -> Pattern:
    """A pattern of config.json. re.error when it is none, InputError when it is one that is not read."""
    if len(text) > LONGEST:
        raise InputError(f"config.json: a regular expression of {len(text):,} characters, expected at most {LONGEST:,}")
    quietly(text)
    try:
        return Pattern(text)
    except RecursionError:
        raise re.error("nested too deeply") from None
