"""Read a regular expression of a config.json as Python's `re` reads it, as far as its language is regular."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmquant.errors import InputError

from ..files.parse import short

ASSERTIONS = {"^": "A", "$": "Z", r"\A": "A", r"\Z": "Z", r"\b": "b", r"\B": "B"}
LOOKS = "flags, or looks around inside"
_COUNT = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
_NAMED = re.compile(r"\?P<\w+>|\?:")


@dataclass(frozen=True)
class Node:
    """A part of a pattern. kind: one (a character), at (an assertion), cat, or, repeat (most: None for no end)."""

    kind: str
    text: str = ""
    parts: tuple[Node, ...] = ()
    least: int = 0
    most: int | None = None


class Reader:
    """Reads a pattern that `re` accepts; InputError for what is not read here."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fault(self, found: str) -> InputError:
        """What is not read."""
        return InputError(f"config.json: {short(self.text)} has {found}, expected a regular expression without")

    def takes(self, word: str) -> bool:
        """Whether a word comes next, which is then behind."""
        found = self.text.startswith(word, self.at)
        self.at += len(word) * found
        return found

    def looks(self) -> Iterator[tuple[bool, Node]]:
        """What looks ahead at the pattern's start: whether it must match."""
        while (wanted := self.takes("(?=")) or self.takes("(?!"):
            yield wanted, self.either()
            self.at += 1

    def either(self) -> Node:
        """Alternatives."""
        parts = [self.sequence()]
        while self.takes("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Node("or", parts=tuple(parts))

    def sequence(self) -> Node:
        """Parts one behind the other."""
        parts: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(self.part()))
        return Node("cat", parts=tuple(parts))

    def repeated(self, node: Node) -> Node:
        """A part with what says how often it comes."""
        signs = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        sign = self.text[self.at : self.at + 1]
        if sign in signs:
            self.at += 1
            least, most = signs[sign]
        elif (count := _COUNT.match(self.text, self.at)) and count[0] != "{}":
            self.at = count.end()
            least = int(count[1] or 0)
            most = (int(count[3]) if count[3] else None) if count[2] else least
        else:
            return node
        if self.takes("+"):
            raise self.fault("a possessive repetition")
        self.takes("?")  # lazy: the same names match
        return Node("repeat", parts=(node,), least=least, most=most)

    def part(self) -> Node:
        """A character, a set of them, an assertion or a group."""
        if self.takes("("):
            named = _NAMED.match(self.text, self.at)
            if named is None and self.text[self.at] == "?":
                raise self.fault(LOOKS)
            self.at = named.end() if named else self.at
            node = self.either()
            self.at += 1
            return node
        begin = self.at
        if self.text[begin] in "*+?":
            raise self.fault("a repetition of what looks ahead")
        self.at += 2 if self.text[begin] == "\\" else 1
        if self.text[begin] == "[":
            self._set()
        text = self.text[begin : self.at]
        if text in ASSERTIONS:
            return Node("at", ASSERTIONS[text])
        if text[0] == "\\" and text[1].isalnum() and text[1] not in "dDwWsS":
            raise self.fault(text)
        return Node("one", text)

    def _set(self) -> None:
        self.takes("^")
        self.takes("]")
        while not self.takes("]"):
            self.at += 2 if self.text[self.at] == "\\" else 1
