"""Publish the artifacts of a run, each to its repositories; what is on a hub already is found whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmquant.errors import naming
from mmquant.monitor import Bar, Monitor, current, watching

from .journal import PUSHED, Journal
from .recipe.read import Recipe
from .uploads import deletes, where_of


def publish(recipe: Recipe, out: Path, journal: Journal) -> None:
    """What is written and passed goes out, in the order of the recipe."""
    from .push import push

    said: set[str] = set()
    left = [(order, name) for order in recipe.push for name in order.variants]
    for at, (order, name) in enumerate(left):
        entry, where = journal.artifacts[name], where_of(order)
        if where in entry.facts.get("pushed", []) or entry.facts.get("failures"):
            continue
        last = all(other != name for _, other in left[at + 1 :])
        delete = last and deletes([order for order, other in left if other == name])
        options = dataclasses.replace(order.options, delete_after_upload=delete)
        with naming(name), watching(Once(current(), said)):
            found = push(out / name, order.repo, options)
        pushed = [*entry.facts.get("pushed", []), where]
        journal.set(name, PUSHED if last else entry.state, pushed=pushed, url=found.url)


class Once:
    """Says every line once: what pushes of many artifacts have in common."""

    def __init__(self, inner: Monitor, said: set[str]) -> None:
        self.inner, self.said = inner, said

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """As the inner one."""
        return self.inner.start(phase, total, unit, done)

    def message(self, text: str) -> None:
        """Unless it was said."""
        if text not in self.said:
            self.said.add(text)
            self.inner.message(text)
