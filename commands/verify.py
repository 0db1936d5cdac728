"""`mmquant verify`: what an agent needs of a server, measured."""

from __future__ import annotations

from pathlib import Path

import click

from mmquant.errors import InputError

from ..runs.options_use import VerifyOptions
from .options import json_option, options_of
from .terminal import print_result

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("url", required=False)
@options_of(VerifyOptions, device=False)
@click.option("--model", type=FILE, help="Instead of URL: serve this GGUF file or folder for the time of the test.")
@click.option("--engine", type=click.Choice(["llama.cpp", "vllm"]), help="With --model: what serves it.")
@click.option(
    "--model-context",
    type=click.IntRange(1),
    help="With --model: its context; default: 32768, or the model's where that is less.",
)
@click.option(
    "--engine-arg",
    multiple=True,
    metavar="KEY=VALUE",
    help="An argument for --engine vllm: gpu_memory_utilization=0.5; repeatable.",
)
@click.option("--record", type=FILE, help="Put the rates into the manifest of this artifact's folder, for its card.")
@click.option("--html", type=FILE, help="Write a report.")
@click.option("--gate", is_flag=True, help="Exit code 4 when a rate is beyond what MiniMax calls right.")
@json_option()
def command(
    url: str | None,
    options: VerifyOptions,
    model: Path | None,
    engine: str | None,
    model_context: int | None,
    engine_arg: tuple[str, ...],
    record: Path | None,
    html: Path | None,
    gate: bool,
    as_json: bool,
) -> None:
    """Ask an OpenAI-compatible server 53 prompts in ten languages, and count tool calls, schemas, thinking, language.

    URL is http://HOST:PORT or https://HOST/v1. --against compares with a second server prompt by prompt.

    Example: mmquant verify http://127.0.0.1:8000 --loops 10 --html verify.html
    """
    import json

    from ..runs.output import check_output
    from ..runs.verify.engine import serving
    from ..runs.verify.record import check_folder, put, write_html
    from ..runs.verify.run import verify

    check_output("--html", html)
    if record is not None:
        check_folder(record)
    if (url is None) == (model is None):
        raise InputError("expected URL, or --model with --engine")
    if (model is None) != (engine is None):
        raise InputError("--engine needs --model, and the other way round")
    if engine is None and (engine_arg or model_context is not None):
        option = "--engine-arg" if engine_arg else "--model-context"
        raise InputError(f"{option}: of a server that is started, expected --model and --engine beside it")
    if model is not None and engine is not None:
        with serving(model, engine, model_context, engine_arg) as address:
            found = verify(address, options)
    else:
        found = verify(str(url), options)
    if html is not None:
        write_html(html, found.document)
    if record is not None:
        put(record, found.document)
    print_result(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines()), as_json)
    if gate:
        found.check()
