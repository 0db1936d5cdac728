"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from mmquant.errors import InputError

from ..convert.files.sizes import parse_size
from .terminal import print_result

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions
    from ..runs.options import CalibratedOptions, PlannedOptions
    from ..runs.results import Quantized

DEFAULT_MODEL = "hf:MiniMaxAI/MiniMax-M2.7"


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


Options = TypeVar("Options")


def options_of(
    options: type[Options], *, device: bool = True, skip: tuple[str, ...] = (), repeat: str | None = None
) -> Decorator:
    """The click options of a class of options in runs/; the command gets one argument, `options`, made of them.

    device: --device as well. skip: fields that this command does not offer; they keep their defaults. repeat: a field
    that may be given several times; the command gets `every`, the options by its value, and `options` of the first.
    """
    declared = [field for field in dataclasses.fields(options) if field.name not in skip]  # type: ignore[arg-type]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**given: object) -> object:
            words = given.pop(repeat) if repeat is not None else ()
            assert isinstance(words, tuple)
            values = {f.name: _value(f, given.pop(f.name)) for f in declared if f.name != repeat}
            if repeat is None:
                return function(options=options(**values), **given)
            field = next(field for field in declared if field.name == repeat)
            every = {str(word): options(**values, **{repeat: _value(field, word)}) for word in words}
            return function(options=next(iter(every.values())), every=every, **given)

        wrapped: Callable[..., Any] = device_option()(command) if device else command
        for field in reversed(declared):
            wrapped = _option(field, field.name == repeat)(wrapped)
        return wrapped

    return decorate


def _option(field: dataclasses.Field[Any], repeat: bool = False) -> Decorator:
    """One field as a click option: its name, default and help are the field's."""
    how = dict(field.metadata)
    kind, choices, least, most, shown = (how.pop(name, None) for name in ("kind", "choices", "least", "most", "shown"))
    if isinstance(field.default, bool):
        how["is_flag"] = True
    elif isinstance(field.default, tuple):
        how["multiple"] = True
    else:
        plain = field.default is not None
        how |= {"default": field.default if shown is None else shown, "show_default": plain}
    if choices is not None:
        how |= {"type": click.Choice([str(choice) for choice in choices])}
        how["default"] = None if field.default is None else str(field.default)
    elif least is not None:
        how["type"] = click.IntRange(least, most)
    elif kind in KINDS:
        how |= KINDS[kind]
    if repeat:
        words = f"{how.get('help') or ''} Repeatable: all in one pass, each into a folder of its own in --out."
        how |= {"multiple": True, "default": (how["default"],), "help": words.strip()}
    return click.option(f"--{field.name.replace('_', '-')}", field.name, **how)


def _value(field: dataclasses.Field[Any], value: object) -> object:
    """What was typed, as the field has it: click knows choices as text only."""
    choices = field.metadata.get("choices")
    return int(str(value)) if choices is not None and isinstance(choices[0], int) else value


def model_option() -> Decorator:
    """--model."""
    text = "Folder, hf:ORG/NAME[@REV], ms:ORG/NAME[@REV] or demo."
    return click.option("--model", default=DEFAULT_MODEL, show_default=True, help=text)


def out_option() -> Decorator:
    """--out."""
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")


def device_option() -> Decorator:
    """--device."""
    text = "cpu, cuda or cuda:N; default: cuda when there is one."
    return click.option("--device", default=None, callback=_device, help=text)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    from ..runs.models import choose_device

    try:
        return choose_device(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of options that take a size: bytes, or None where nothing was given."""
    try:
        return None if value is None else parse_size(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


def layers(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    """Callback of --layers: 0:B, the first B layers."""
    if value is None:
        return None
    match = re.fullmatch("0?:([0-9]{1,4})", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r}, expected 0:B (a calibration starts at the first layer)")
    return range(int(match[1]))


KINDS: dict[str, dict[str, Any]] = {
    "bits": {"type": click.FloatRange(1, 16)},
    "size": {"callback": size},
    "layers": {"callback": layers},
    "path": {"type": click.Path(path_type=Path)},
    "file": {"type": click.Path(path_type=Path, exists=True, dir_okay=False)},
}


def fresh_option() -> Decorator:
    """--fresh."""
    text = "Remove an unfinished run in --out and start over."
    return click.option("--fresh", is_flag=True, expose_value=False, callback=_fresh, help=text)


def _fresh(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Remembers the wish; `begin` carries it out once everything else that was typed is known to be right."""
    ctx.meta["mmquant.fresh"] = value


def begin(out: Path, dry_run: bool) -> Path | None:
    """The folder in which the command may work from now on: cleared for --fresh, None for a dry run."""
    if dry_run:
        return None
    if click.get_current_context().meta["mmquant.fresh"] and first_process():
        from ..runs.place import start_over

        start_over(out)
    return out


def several(
    model: str, out: Path, command: str, every: Mapping[str, Any], *, device: str, fetch: FetchOptions, dry_run: bool
) -> None:
    """Make several variants of one command in one pass, each into a folder of `out` that is called by its word."""
    from ..runs.recipe.read import Recipe, Variant
    from ..runs.run import run

    if not dry_run and click.get_current_context().meta["mmquant.fresh"]:
        raise InputError("--fresh: for one variant; expected it without, or the folder deleted")
    variants = tuple(Variant(word, command, options) for word, options in every.items())
    made = run(Recipe(model, variants), out, device=device, fetch=fetch, dry_run=dry_run)
    if first_process():
        print_result(json.dumps(made.to_dict()) if _as_json() else "\n".join(made.lines()), _as_json())
    if made.refusal is not None:
        raise made.refusal


def first_process() -> bool:
    """Whether this process speaks for all: under torchrun the first one."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Quantized) -> None:
    """The line of a result on stdout, once under torchrun; then, of a dry run, what the real run would stop at."""
    if first_process():
        print_result(json.dumps(result.to_dict()) if _as_json() else result.line, _as_json())
    if result.refusal is not None:
        raise result.refusal


def refuse_without_effect(why: str, *names: str) -> None:
    """InputError naming the first option that was typed though it changes nothing; names: of parameters."""
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        typed = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and typed:
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise InputError(f"{name} has no effect {why}; leave it out")


TEXT = ("text", "text_only", "evaluation", "context", "windows", "seed")
OTHERS = ("propagate", "statistics", "effort")
CALIBRATED = (*TEXT, *OTHERS)


def refuse_idle_text(options: CalibratedOptions) -> None:
    """InputError for options of calibration that would change nothing of what was asked for."""
    if options.method == "rtn":
        refuse_without_effect("with --method rtn, which is not calibrated", *idle_text(options), *OTHERS)
    elif options.statistics is not None:
        refuse_without_effect("with --statistics, which stands for the text", *idle_text(options))
    if not options.text:
        refuse_without_effect("without --text", "text_only")


def idle_text(options: PlannedOptions) -> tuple[str, ...]:
    """Options of the text where calibration reads none: all, unless a plan is measured on it first."""
    planned = options.size is not None or options.target is not None
    return () if planned and options.sensitivity is None else TEXT


def refuse_idle_plan(options: PlannedOptions, *chosen: str) -> None:
    """InputError for options of a plan without one, and for those that a plan chooses in their place."""
    if options.size is None and options.target is None:
        refuse_without_effect("without --size or --target", "sensitivity", "judged_windows")
    elif options.sensitivity is not None:
        refuse_without_effect("with --sensitivity, which was judged", "judged_windows")
    if options.target is None:
        refuse_without_effect("without --target", "target_context")
    if options.planned:
        refuse_without_effect("with a plan, which chooses it", *chosen)


def json_option() -> Decorator:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def result_json_option() -> Decorator:
    """--json of a command whose result `show` or `several` prints."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta["mmquant.json"] = value

    text = "One JSON document on stdout."
    return click.option("--json", is_flag=True, expose_value=False, callback=remember, help=text)


def _as_json() -> bool:
    return bool(click.get_current_context().meta.get("mmquant.json"))


def dry_run_option() -> Decorator:
    """--dry-run."""
    return click.option("--dry-run", is_flag=True, help="Print the plan and the bytes it needs; write nothing.")
