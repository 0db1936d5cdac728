"""Errors with their exit codes (the table in the README)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class MmquantError(Exception):
    """One line for the user: where, what was found, what was expected. Exit code 1.

    What it quotes may come from outside, so line breaks become blanks and terminal codes are not printed.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else "\ufffd" for c in line))


class InputError(MmquantError, ValueError):
    """Usage or bad input: something that the user can mend. A plain ValueError is a fault of mmquant itself."""

    exit_code = 2


class PartialError(MmquantError):
    """Part of the work is done; running the command again continues."""

    exit_code = 3


class GateError(MmquantError):
    """A quality gate failed."""

    exit_code = 4


class FitError(MmquantError):
    """Does not fit: memory or disk."""

    exit_code = 5


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` (a folder, a tensor, a layer) before the message of an InputError inside that does not begin so."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith(tuple(f"{InputError(where)}{mark}" for mark in ": /\\")):
            error.args = InputError(f"{where}: {error}").args
        raise


def naming_label(method: Callable[P, T]) -> Callable[P, T]:
    """Method whose InputErrors name the `label` of its object, which __init__ has set before it raises one."""

    @wraps(method)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except InputError:
            owner: Any = args[0]
            with naming(owner.label):
                raise

    return named


def suggest(word: str, names: Iterable[str]) -> str:
    """What to say beside an unknown word: the name it was meant for, or all of them."""
    import difflib

    names = list(names)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
