"""Run chat templates from outside in a Jinja2 sandbox, with limits on steps and sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

P = ParamSpec("P")
T = TypeVar("T")

MOST_STEPS = 100_000  # turns of loops and calls of macros in one rendering
MOST_TEXT = 64 << 20  # characters of one conversation
LARGEST = 1_000_000  # a number that methods, filters and operators are given: widths, repetitions, exponents


class Sandbox(ImmutableSandboxedEnvironment):
    """As transformers' environment, but a template that loops without end or pads without measure is refused."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - jinja2's own
        super().__init__(**options)
        self.steps = 0
        self.globals["__step__"] = self._step
        for name, function in list(self.filters.items()):
            if name in ("center", "indent", "format", "batch", "slice", "wordwrap", "truncate", "round"):
                self.filters[name] = measured(function, name)

    def _step(self) -> str:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TemplateError(f"more than {MOST_STEPS:,} steps, the template does not end")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every body of a loop and of a macro begins with a step."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            call = nodes.Call(nodes.Name("__step__", "load"), [], [], None, None)
            node.body.insert(0, nodes.Output([call]).set_lineno(node.lineno))  # type: ignore[attr-defined]
        return tree

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """`"...".format` within measure."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(value, "__self__", None))
        return super().wrap_str_format(value)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Repetition, powers and %-formatting within measure."""
        for one, other in ((left, right), (right, left)):
            _check_number(one)
            if operator == "*" and isinstance(one, int) and isinstance(other, Sized) and one * len(other) > LARGEST:
                raise TemplateError(f"a repetition of {one} times {len(other)}, expected at most {LARGEST:,} in all")
        if operator == "**" and isinstance(right, int) and right > 64:
            raise TemplateError(f"a power of {right}, expected at most 64")
        _check_format(left if operator == "%" else None)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        """Call a function of the template, with numbers within measure."""
        for value in (*args, *kwargs.values()):
            _check_number(value)
        return super().call(__context, __obj, *args, **kwargs)


def _check_number(value: object) -> None:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise TemplateError(f"the number {str(value)[:20]}, expected at most {LARGEST:,}")


def _check_format(text: object) -> None:
    if isinstance(text, str) and re.search(r"\d{6}|\*", text):
        raise TemplateError(f"the format {text[:40]!r}, expected no widths of six digits")


def measured(function: Callable[P, T], name: str) -> Callable[P, T]:
    """A filter that refuses numbers beyond LARGEST, and formats of such widths."""

    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        for value in (*args, *kwargs.values()):
            _check_number(value)
            _check_format(value if name == "format" else None)
        return function(*args, **kwargs)

    return wraps(function)(inner)  # with jinja's mark of what it passes


def render(template: Template, given: dict[str, Any]) -> str:
    """The text that a template of a Sandbox makes. Raises TemplateError beyond MOST_STEPS or MOST_TEXT."""
    environment = template.environment
    if isinstance(environment, Sandbox):
        environment.steps = 0
    parts, size = [], 0
    for part in template.generate(given):
        size += len(part)
        if size > MOST_TEXT:
            raise TemplateError(f"more than {MOST_TEXT:,} characters, the template does not end")
        parts.append(part)
    return "".join(parts)
