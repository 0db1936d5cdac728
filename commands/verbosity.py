"""-q and -v, which every command takes behind its name."""

from __future__ import annotations

import os

import click

from .terminal import Terminal


def with_verbosity(command: click.Command) -> click.Command:
    """The command with --quiet and --verbose added, once."""
    if all(parameter.name != "quiet" for parameter in command.params):
        command.params += [
            click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_quiet, help=QUIET),
            click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_verbose, help=VERBOSE),
        ]
    return command


QUIET = "No progress and no notes: results, warnings and errors alone."
VERBOSE = "Each request to a hub, and the traceback of an error."


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    terminal = ctx.find_object(Terminal)
    if value and terminal is not None:
        terminal.quiet = True


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    terminal = ctx.find_object(Terminal)
    if value and terminal is not None:
        terminal.verbose()
        os.environ["MMQUANT_DEBUG"] = "1"
