"""`mmquant completion`: complete commands and options in a shell."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mmquant.errors import InputError

from .options import json_option
from .terminal import print_result

# Where each shell looks by itself (zsh: where it is told to), below the user's data or configuration folder.
PLACES = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/mmquant"),
    "zsh": ("XDG_DATA_HOME", ".local/share", "zsh/site-functions/_mmquant"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/mmquant.fish"),
}


@click.command()
@click.argument("shell", type=click.Choice(list(PLACES)), required=False)
@click.option("--install", is_flag=True, help="Write the script to where the shell looks for it.")
@json_option()
def command(shell: str | None, install: bool, as_json: bool) -> None:
    """Print the completion script of SHELL (default: the one of $SHELL), or install it.

    Example: mmquant completion --install
    """
    import json

    from ..convert.files.atomic import write_whole

    name = shell or shell_of(os.environ.get("SHELL", ""))
    text = script(name)
    if not install:
        click.echo(json.dumps({"shell": name, "script": text}) if as_json else text)
        return
    path = place(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    found = json.dumps({"shell": name, "path": str(path)})
    print_result(found if as_json else f"{path}: written{hint(name, path)}", as_json)


def shell_of(path: str) -> str:
    """The name of a shell by its path; InputError for one that has no script."""
    name = Path(path).name
    if name not in PLACES:
        raise InputError(f"SHELL is {path!r}, expected mmquant completion {'|'.join(PLACES)}")
    return name


def place(shell: str) -> Path:
    """The file that the shell reads."""
    variable, default, rest = PLACES[shell]
    return Path(os.environ.get(variable) or Path.home() / default) / rest


def hint(shell: str, path: Path) -> str:
    """What is left to do."""
    if shell == "zsh":
        return f"; put fpath+=({path.parent}) before compinit in ~/.zshrc, then start a new shell"
    return "; start a new shell"


def script(shell: str) -> str:
    """The script; the shell then asks `mmquant` itself for the words."""
    from click.shell_completion import get_completion_class

    from .cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(cli, {}, "mmquant", "_MMQUANT_COMPLETE").source()
