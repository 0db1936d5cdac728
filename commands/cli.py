"""The command line: one module per command, imported on use."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from types import ModuleType

import click

from mmquant import __version__
from mmquant.errors import MmquantError, suggest

COMMANDS = {
    "fp8": "FP8 for vLLM and SGLang, exact from the release.",
    "bf16": "BF16 for fine-tuning, the release without its quantization.",
    "int4": "INT4 weights (W4A16) for vLLM and SGLang.",
    "awq": "INT4 by AWQ, in its format.",
    "nvfp4": "NVFP4 weights for vLLM, SGLang and TensorRT-LLM.",
    "mxfp4": "MXFP4 weights for vLLM and SGLang.",
    "mlx": "MLX weights for Macs (mlx_lm), made anywhere.",
    "gguf": "GGUF for llama.cpp.",
    "run": "Every variant of a recipe in one pass, resumable anywhere.",
    "status": "How far a run is.",
    "plan": "The best types for a size or a machine, measured.",
    "calibrate": "Every expert's statistics in one streamed pass.",
    "eval": "Perplexity, KL divergence and agreement with the reference.",
    "verify": "Tool calls, thinking, language of a running server.",
    "pull": "Fetch a repository, verified and resumable.",
    "push": "Publish a finished folder to a hub.",
    "doctor": "What breaks a GGUF file or a quantized folder.",
    "fit": "What fits on which machine, with context and command.",
    "report": "One HTML page of a folder of artifacts.",
    "inspect": "What is in a checkpoint.",
    "demo": "The whole pipeline on the bundled model.",
    "completion": "Complete commands and options in your shell.",
}

# What the system says of a path that the user chose wrongly.
PLACES = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class Commands(click.Group):
    """Imports a command's module only when it is asked for: `mmquant --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A UsageError that names the nearest command for an unknown one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"no command {name!r}; {suggest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command when it is used."""
        if cmd_name not in COMMANDS:
            return None
        from .verbosity import with_verbosity

        found = with_verbosity(importlib.import_module(f"mmquant.commands.{cmd_name}").command)
        found.short_help = COMMANDS[cmd_name]  # what completion shows
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def watched(ctx: click.Context) -> None:
    """The terminal watches what the command does, as long as it runs; under torchrun that of the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    from mmquant.monitor import watching

    from .terminal import Terminal

    ctx.obj = Terminal()
    ctx.with_resource(ctx.obj.warnings())
    ctx.with_resource(watching(ctx.obj))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="mmquant")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Quantize and convert MiniMax-M2.7 to FP8, INT4, NVFP4, MXFP4, MLX and GGUF, checked against the reference.

    Exit codes: 0 ok, 1 failure, 2 usage or bad input, 3 partial, 4 quality gate, 5 does not fit, 130 interrupted
    (143 by TERM, 129 by HUP).
    """
    watched(ctx)


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; what is on disk is found again, as after ^C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop(number: int, frame: object) -> None:
    """Signal handler: the first signal ends the run in order, a second one at once."""
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)


def catch_signals() -> None:
    """TERM and HUP say what INT says. A signal that somebody chose to ignore (nohup) stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def main() -> None:
    """Run the command line; every user's error becomes one line on stderr and its exit code, a bug a traceback."""
    catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        together()
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help itself, as long as it is
        sys.exit(error.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        number = cause.number if isinstance(cause, Stopped) else int(signal.SIGINT)
        fail("interrupted; run the same command again to continue", 128 + number)
    except MmquantError as error:
        fail(str(error), error.exit_code)
    except Exception as error:
        try:
            words, code = explained(error)
        except Exception:
            report(1)
            raise
        fail(words, code)


def together() -> None:
    """Run the command line, under torchrun with the other ranks: one that is lost to them ends as they do."""
    try:
        cli.main(prog_name="mmquant", standalone_mode=False)
    except Exception as error:
        group = ranks()
        if group is not None and (late := group.waited_long(error)) is not None:
            raise late from error
        if group is not None and group.is_lost(error):
            group.await_end()
        raise
    group = ranks()
    if group is not None:
        group.leave()


def ranks() -> ModuleType | None:
    """What this process knows of other ranks; None where it has joined none."""
    return sys.modules.get("mmquant.calibration.model.distributed")


def report(code: int) -> int | None:
    """Tell the other ranks that this one ends: None where it is the first and speaks, else the first one's code."""
    group = ranks()
    return None if group is None else group.fail(code)


def explained(error: Exception) -> tuple[str, int]:
    """Words and exit code for what the machine refused: memory, disk, files. Everything else is a bug: raised again."""
    from ..runs.memory import does_not_fit, is_out_of_memory

    if is_out_of_memory(error):
        return str(does_not_fit(error)), 5
    if not isinstance(error, OSError):
        raise error
    from ..runs.place import disk_full

    if error.errno in PLACES and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}, expected a place that can be read or written", 2
    if disk_full(error):
        where = os.fsdecode(error.filename) if error.filename is not None else "the disk"
        return f"{where}: {error.strerror}, expected room for more; then run the same command again", 5
    return str(error), 1


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit. MMQUANT_DEBUG=1 shows the traceback as well."""
    if os.environ.get("MMQUANT_DEBUG"):
        import traceback

        traceback.print_exc()
    group = ranks()
    joined = group is not None and group.is_joined()
    known = report(code)
    # Where another rank failed before, that one says why; torchrun interrupts all, and the first speaks for them.
    silent = known is not None or (code > 128 and not joined and os.environ.get("RANK", "0") != "0")
    if not silent:
        from .terminal import complain

        with contextlib.suppress(OSError):  # the terminal may be gone, as after HUP
            complain("mmquant: " + " ".join(message.split()))
    code = code if known is None else known
    if joined:  # a group that has lost a rank may wait for it in its destructor
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
