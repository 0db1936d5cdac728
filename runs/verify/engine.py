"""Serve a model for `mmquant verify`: llama.cpp's server (from the extra's wheel) or `vllm serve`, as a child."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import requests

from mmquant.errors import InputError, MmquantError
from mmquant.monitor import current

from ...convert.files.child import SAFE_PATH, environment
from ...convert.files.parse import parse_json
from ...convert.models import architecture_of

ENGINES = ("llama.cpp", "vllm")
READY = 1800.0  # seconds for a large model to load
LLAMA = """import sys, threading, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.n_ctx = sys.argv[1], ["127.0.0.1"], int(sys.argv[2]), int(sys.argv[3])
p.use_jinja, p.n_parallel = True, 1
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def serving(model: Path, engine: str, context: int) -> Iterator[str]:
    """The address of a server of `model` (a GGUF file or a folder), which ends with the block.

    InputError when the engine is not installed or takes no such model; MmquantError when its process ends early.
    """
    port = _free_port()
    command = _command(model, engine, port, context)
    current().message(f"starting {engine} with {model}")
    with (
        tempfile.TemporaryFile() as log,  # a pipe that nobody reads would stop a server that says much
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=environment({})
        ) as child,
    ):
        try:
            _wait(child, log, f"http://127.0.0.1:{port}", engine)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _command(model: Path, engine: str, port: int, context: int) -> list[str]:
    if engine == "llama.cpp":
        if model.suffix != ".gguf" or not model.is_file():
            raise InputError(f"{model}: expected a .gguf file for --engine llama.cpp")
        from ..evaluation.llamacpp import available

        if not available():
            raise InputError("--engine llama.cpp: xllamacpp is not installed; pip install 'mmquant[llamacpp]'")
        return [sys.executable, SAFE_PATH, "-c", LLAMA, str(model), str(port), str(context)]
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: expected a folder with config.json for --engine vllm")
    program = shutil.which("vllm")
    if program is None:
        raise InputError("--engine vllm: no program vllm on PATH; pip install vllm")
    config = parse_json((model / "config.json").read_bytes(), str(model / "config.json"))
    known = architecture_of(config).serving
    parsers = list(known.vllm) if known is not None else []
    tools = ["--enable-auto-tool-choice", *parsers, "--max-model-len", str(context), "--port", str(port)]
    return [program, "serve", str(model), "--host", "127.0.0.1", *tools]


def _wait(child: subprocess.Popen[bytes], log: IO[bytes], url: str, engine: str) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if child.poll() is not None:
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().splitlines()
            raise MmquantError(f"{engine} ended with {child.returncode}: {said[-1] if said else 'without a word'}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        time.sleep(0.2)
    raise MmquantError(f"{engine}: not ready after {READY:.0f} s")
