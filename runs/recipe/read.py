"""Read a recipe: YAML, checked against the schema; every fault names its line and its key."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from mmquant.errors import FitError, InputError, suggest

from ...convert.files.parse import DEEPEST, YAML_FAULTS, one_line, short
from ...convert.files.sizes import parse_size
from ...convert.fitting.targets import Target, find_target, read_targets
from ...convert.hub.hubs import DEFAULT_HUB, HUBS, SPEC, expected
from ..journal import JOURNAL, LOG
from ..option import Checked
from ..options import TextOptions
from ..options_use import EvalOptions, PushOptions
from .schema import COMMANDS, recipe_schema

LARGEST = 1 << 20  # bytes of a recipe
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Variant:
    """One artifact: its folder's name, its command and that command's options."""

    name: str
    command: str
    options: Any
    gates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Push:
    """A repository, and the variants that go there. as_completed: weight files leave as soon as they are whole."""

    repo: str
    variants: tuple[str, ...]
    options: PushOptions
    as_completed: bool = False


@dataclass(frozen=True)
class Limits:
    """Bytes, and shards of the source on disk at once; None: no limit of the recipe's."""

    ram: int | None = None
    disk: int | None = None
    gpu: int | None = None
    shards: int | None = None


class Marks:
    """A recipe's text with the line of every key."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Key, int] = {}

    def fault(self, key: Key, text: str) -> InputError:
        """The error of one key: file, line, key, what is wrong."""
        return InputError(self.where_of(key, text))

    def where_of(self, key: Key, text: str) -> str:
        """File, line and key before a text."""
        at = key
        while at and at not in self.lines:
            at = at[:-1]
        line = self.lines.get(at, 1)
        name = ".".join(str(part) for part in key)
        return f"{self.where}:{line}: {name + ': ' if name else ''}{text}"


@dataclass(frozen=True)
class FitTargets:
    """Machines that the artifacts are for; context: tokens that must fit, None: the largest that does."""

    targets: tuple[Target, ...]
    context: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What `mmquant run` is asked for. check: how artifacts are scored in the same pass; None: not at all.

    marks: where everything stands, for errors that are found later.
    """

    model: str
    variants: tuple[Variant, ...]
    device: str | None = None
    check: EvalOptions | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    push: tuple[Push, ...] = ()
    limits: Limits = Limits()
    fit: FitTargets | None = None
    marks: Marks | None = field(default=None, compare=False)

    @contextmanager
    def at(self, *key: str | int) -> Iterator[None]:
        """An InputError or FitError inside names file, line and key."""
        try:
            yield
        except (InputError, FitError) as error:
            if self.marks is None:
                raise
            raise type(error)(self.marks.where_of(key, str(error))) from None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. InputError with the line and key of the first fault."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a recipe (mmquant run --init writes one)")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes, expected a recipe")
    return parse_recipe(path.read_bytes(), str(path))


def parse_recipe(data: bytes | str, where: str) -> Recipe:
    """The recipe of a text; `where` names it in errors."""
    document, marks = load(data, where)
    check_schema(document, marks)
    return build(document, marks)


def load(data: bytes | str, where: str) -> tuple[dict[str, Any], Marks]:
    """Plain values of the YAML text, and where they stand."""
    marks = Marks(where)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{where}:{line}: not YAML ({one_line(error.problem)})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not YAML ({one_line(error)})") from None
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{where}:{event.start_mark.line + 1}: anchors and aliases are not read, expected plain values"
            )
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where}:1: expected keys such as model and variants")
    return _plain(node, (), marks), marks


def _plain(node: yaml.Node, key: Key, marks: Marks) -> Any:  # noqa: ANN401 - YAML's values
    """A node's value; lines of keys are noted. Anchors and tags are refused by what they would need to be."""
    marks.lines.setdefault(key, node.start_mark.line + 1)
    if len(key) > DEEPEST:
        raise marks.fault(key[:3], f"nested deeper than {DEEPEST} levels")
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for name, value in node.value:
            word = str(name.value) if isinstance(name, yaml.ScalarNode) else ""
            inner = (*key, word)
            if not word or word in out:
                raise marks.fault(key, f"{short(word)} stands twice" if word else "expected a word as key")
            marks.lines[inner] = name.start_mark.line + 1
            out[word] = _plain(value, inner, marks)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value, (*key, number), marks) for number, value in enumerate(node.value)]
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "timestamp":  # a revision may look like one
        return str(node.value)
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, *YAML_FAULTS):
        raise marks.fault(key, f"{short(node.value)} as {short(kind)}, expected a plain value") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise marks.fault(key, f"{value}, expected a finite number")
    if value is not None and not isinstance(value, str | int | float | bool):
        return str(node.value)
    return value


def check_schema(document: dict[str, Any], marks: Marks) -> None:
    """InputError for the first fault in the order of the file."""
    validator = jsonschema.Draft202012Validator(recipe_schema())
    faults = [_deepest(error) for error in validator.iter_errors(document)]
    found = [(tuple(error.absolute_path), error) for error in faults]
    for key, error in sorted(found, key=lambda one: (marks.lines.get(one[0], 0), len(one[0]))):
        raise marks.fault(*explained(key, error))


def _deepest(error: jsonschema.ValidationError) -> jsonschema.ValidationError:
    while error.context:
        error = max(error.context, key=lambda one: len(one.absolute_path))
    return error


def explained(key: Key, error: jsonschema.ValidationError) -> tuple[Key, str]:
    """The key that is wrong, and in words what is wrong with it."""
    rule, value, found = error.validator, error.validator_value, short(error.instance)
    if rule == "additionalProperties":
        known = list(error.schema.get("properties", {}))  # type: ignore[union-attr]
        strange = next(name for name in error.instance if name not in known)  # type: ignore[union-attr]
        return (*key, strange), f"unknown key; {suggest(strange, known)}"
    if rule == "required":
        missing = next(name for name in value if name not in error.instance)  # type: ignore[operator, union-attr]
        return key, f"{missing} is missing"
    if rule in ("enum", "const"):
        words = value if isinstance(value, list) else [value]
        return key, f"{found}, expected {' or '.join(str(word) for word in words)}"
    if rule == "type":
        words = value if isinstance(value, list) else [value]
        return key, f"{found}, expected {' or '.join(str(word) for word in words)}"
    if rule in ("minimum", "maximum"):
        return key, f"{found}, expected {'at least' if rule == 'minimum' else 'at most'} {value}"
    return key, f"{found}, {one_line(error.message)}" if rule != "minProperties" else "empty, expected a variant"


def build(document: dict[str, Any], marks: Marks) -> Recipe:
    """The recipe of a document that follows the schema; what options contradict is found here."""
    corpora = document.get("corpora", {})
    variants = tuple(_variant(name, dict(entry), corpora, marks) for name, entry in document["variants"].items())
    model = document["model"]
    if "revision" in document:
        if "@" in model or not model.startswith(tuple(f"{key}:" for key in HUBS)):
            raise marks.fault(("revision",), f"model is {short(model)}, expected {expected('ORG/NAME')}")
        model += "@" + document["revision"]
    check, gates = document.get("check"), {}
    if check is not None:
        gates = {name: float(value) for name, value in check.get("gates", {}).items()}
        rest = {name: value for name, value in check.items() if name != "gates"}
        check = options_from(EvalOptions, rest, ("check",), marks)
    pushes = tuple(
        _push(number, dict(entry), variants, check is not None, marks)
        for number, entry in enumerate(document.get("push", []))
    )
    limits = {name: _size(value, ("limits", name), marks) for name, value in document.get("limits", {}).items()}
    machines = _fit(document["fit"], marks) if "fit" in document else None
    found = Recipe(model, variants, document.get("device"), check, gates, pushes, Limits(**limits), machines, marks)
    for push in range(len(pushes)):
        with found.at("push", push, "repo"):
            check_repository(pushes[push].repo)
    return found


def check_repository(name: str) -> None:
    """InputError unless `name` is ORG/NAME."""
    if not SPEC.fullmatch(f"{DEFAULT_HUB.key}:{name}") or "@" in name or ".." in name:
        raise InputError(f"{short(name)}, expected ORG/NAME")


def _fit(entry: dict[str, Any], marks: Marks) -> FitTargets:
    file = Path(entry["machines"]) if "machines" in entry else None
    try:
        known = read_targets(file)
    except InputError as error:
        raise marks.fault(("fit", "machines"), str(error)) from None
    found = []
    for at, name in enumerate(entry["targets"]):
        try:
            found.append(find_target(name, known))
        except InputError as error:
            raise marks.fault(("fit", "targets", at), str(error)) from None
    return FitTargets(tuple(found), entry.get("context"))


def _variant(name: str, entry: dict[str, Any], corpora: dict[str, Any], marks: Marks) -> Variant:
    command, key = entry.pop("command"), ("variants", name)
    if name in (JOURNAL, LOG):
        raise marks.fault(key, "a file of the run has this name, expected another")
    gates = {gate: float(value) for gate, value in entry.pop("gates", {}).items()}
    corpus = entry.pop("corpus", None)
    if corpus is not None and corpus not in corpora:
        raise marks.fault((*key, "corpus"), f"{short(corpus)}; {suggest(corpus, corpora)}")
    options = COMMANDS[command]
    if corpus is None and len(corpora) == 1 and issubclass(options, TextOptions):
        corpus = next(iter(corpora))
    text = corpora[corpus] if corpus is not None else {}
    return Variant(name, command, options_from(options, {**text, **entry}, key, marks), gates)


def _push(number: int, entry: dict[str, Any], variants: Sequence[Variant], checked: bool, marks: Marks) -> Push:
    key, repo, early = ("push", number), entry.pop("repo"), entry.pop("as_completed", False)
    models = [variant.name for variant in variants if variant.command != "calibrate"]
    chosen = entry.pop("variants", models)
    for at, name in enumerate(chosen):
        if name not in models:
            raise marks.fault((*key, "variants", at), f"{short(name)}; {suggest(name, models)}")
    options = options_from(PushOptions, entry, key, marks)
    if early and checked and not (options.private or options.pr or options.revision):
        text = "what the check refuses would be public already; expected private, pr or a revision beside it"
        raise marks.fault((*key, "as_completed"), text)
    return Push(repo, tuple(chosen), options, early)


def options_from(options: type[Checked], given: dict[str, Any], key: Key, marks: Marks) -> Any:  # noqa: ANN401
    """The options of a class from a recipe's values."""
    kinds, values = typing.get_type_hints(options), {}
    for one in dataclasses.fields(options):  # type: ignore[arg-type]
        if one.name not in given or given[one.name] is None:
            continue
        value = given[one.name]
        if one.metadata.get("kind") == "size":
            value = _size(value, (*key, one.name), marks)
        elif isinstance(one.default, tuple):
            value = (value,) if isinstance(value, str) else tuple(value)
        elif Path in (typing.get_args(kinds[one.name]) or (kinds[one.name],)):
            value = Path(value)
        values[one.name] = value
    try:
        return options(**values)
    except InputError as error:
        raise marks.fault(key, str(error)) from None


def _size(value: int | str, key: Key, marks: Marks) -> int:
    try:
        return parse_size(str(value))
    except InputError as error:
        raise marks.fault(key, str(error)) from None
