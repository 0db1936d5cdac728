"""The command line: one module a command, loaded when it is called."""

from __future__ import annotations

import importlib
import os
import sys

import click

from mmquant import __version__
from mmquant.errors import MmquantError

COMMANDS = {
    "fp8": "FP8 for vLLM and SGLang, exact from the release.",
    "int4": "INT4 weights (W4A16) for vLLM and SGLang.",
    "awq": "INT4 by AWQ, in its format.",
    "gguf": "GGUF for llama.cpp.",
    "calibrate": "Every expert's statistics in one streamed pass.",
    "eval": "Perplexity, KL divergence and agreement with the reference.",
    "pull": "Fetch a repository, verified and resumable.",
    "push": "Publish a finished folder to a hub.",
    "doctor": "Finds and cures what breaks a GGUF file.",
    "inspect": "What is in a checkpoint.",
    "demo": "The whole pipeline on the bundled model.",
}


class Commands(click.Group):
    """Imports a command's module only when it is asked for: `mmquant --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"mmquant.commands.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmquant")
def cli() -> None:
    """Quantize and convert MiniMax-M2.7 to FP8, INT4 and GGUF, checked against the reference.

    Exit codes: 0 ok, 1 failure, 2 usage or bad input, 3 partial, 4 quality gate, 5 does not fit, 130 interrupted.
    """


def main() -> None:
    """Run the command line; every error becomes one line on stderr and its exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; run the same command again to continue", 130)
    except MmquantError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        from ..runs.folder import disk_full

        fail(str(error), 5 if disk_full(error) else 1)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit. MMQUANT_DEBUG=1 shows the traceback as well."""
    if os.environ.get("MMQUANT_DEBUG"):
        import traceback

        traceback.print_exc()
    print("mmquant: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
