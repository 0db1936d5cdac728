"""Serve a model for `mmquant verify`: llama.cpp's server (from the extra's wheel) or `vllm serve`, as a child."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import requests

from mmquant.errors import InputError, MmquantError
from mmquant.monitor import current

from ...convert.files.child import SAFE_PATH, environment
from ...convert.files.parse import parse_json
from ...convert.models import architecture_of
from ..engine_args import OPTION, flags, parse_arguments

ENGINES = ("llama.cpp", "vllm")
READY = 1800.0  # seconds for a large model to load
ENDS = 30.0  # seconds for a server to end
CONTEXT = 32768
LOG = 4 << 20  # bytes of a server's last words
OWN = {"model": "--model", "max_model_len": "--model-context", "host": "it left out", "port": "it left out"}
# Settings of vLLM and what it starts. Not its key: a server that had one would ask for it.
SETTINGS = ("VLLM_", "NCCL_", "GLOO_", "FLASHINFER_", "SAFETENSORS_", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
SECRET = "VLLM_API_KEY"
LLAMA = """import sys, threading, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.n_ctx = sys.argv[1], ["127.0.0.1"], int(sys.argv[2]), int(sys.argv[3])
p.use_jinja, p.n_parallel = True, 1
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def serving(model: Path, engine: str, context: int | None = None, arguments: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a server of `model` (a GGUF file or a folder), which ends with the block.

    context: default 32,768 or the model's own, whichever is less. arguments: KEY=VALUE of vLLM's. InputError when the
    engine is not installed or takes no such model; MmquantError when its process ends early.
    """
    port = _free_port()
    command = _command(model, engine, port, context, arguments)
    current().message(f"starting {engine} with {model}")
    with (
        _log(engine) as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment(_settings()),
            start_new_session=True,  # its own children end with it
        ) as child,
    ):
        try:
            _wait(child, log, f"http://127.0.0.1:{port}", engine)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(ENDS)
            _kill(child)


@contextlib.contextmanager
def _log(engine: str) -> Iterator[IO[bytes]]:
    """A file for what a server says: a pipe that nobody reads would stop it. It stays where an error names it."""
    kept = False
    with tempfile.NamedTemporaryFile(prefix=f"mmquant-{engine}-", suffix=".log", delete=False) as log:
        try:
            yield log
        except MmquantError as error:
            kept = True
            raise type(error)(f"{error}; its log: {log.name}") from error
        finally:
            log.close()
            if not kept:
                Path(log.name).unlink(missing_ok=True)


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS) and name != SECRET}


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started: an engine's process that stays behind keeps the GPU's memory."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _command(model: Path, engine: str, port: int, context: int | None, arguments: tuple[str, ...]) -> list[str]:
    if engine == "llama.cpp":
        if arguments:
            raise InputError(f"{OPTION}: llama.cpp has none here, expected --engine vllm")
        return _llama(model, port, CONTEXT if context is None else context)
    given = parse_arguments(arguments, OWN)
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: expected a folder with config.json for --engine vllm")
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which("vllm", path=beside)
    if program is None:
        raise InputError("--engine vllm: no program vllm on PATH; pip install vllm")
    config = parse_json((model / "config.json").read_bytes(), str(model / "config.json"))
    known = architecture_of(config).serving
    parsers = list(known.vllm) if known is not None else []
    own = ["--max-model-len", str(_context(config, context)), "--host", "127.0.0.1", "--port", str(port)]
    return [program, "serve", str(model), "--enable-auto-tool-choice", *parsers, *flags(given), *own]


def _llama(model: Path, port: int, context: int) -> list[str]:
    if model.suffix != ".gguf" or not model.is_file():
        raise InputError(f"{model}: expected a .gguf file for --engine llama.cpp")
    from ..evaluation.llamacpp import available

    if not available():
        raise InputError("--engine llama.cpp: xllamacpp is not installed; pip install 'mmquant[llamacpp]'")
    return [sys.executable, SAFE_PATH, "-c", LLAMA, str(model), str(port), str(context)]


def _context(config: dict[str, Any], wanted: int | None) -> int:
    """Tokens that the server is asked for; vLLM refuses more than the model has."""
    most = config.get("max_position_embeddings")
    if not isinstance(most, int) or most < 1:
        return CONTEXT if wanted is None else wanted
    if wanted is not None and wanted > most:
        raise InputError(f"--model-context {wanted}: the model has {most}")
    return min(CONTEXT, most) if wanted is None else wanted


def _wait(child: subprocess.Popen[bytes], log: IO[bytes], url: str, engine: str) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if child.poll() is not None:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG))
            raise MmquantError(f"{engine} ended with {child.returncode}: {_reason(log.read())}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        time.sleep(0.2)
    raise MmquantError(f"{engine}: not ready after {READY:.0f} s")


def _reason(log: bytes) -> str:
    """The first error of a log that names its kind, with the line after it; else its last line."""
    text = log.decode("utf-8", "replace").strip()
    lines = [re.sub(r"^(\(\w+ pid=\d+\) ?)?((ERROR|INFO|WARNING) [^\]]*\] ?)?", "", line) for line in text.splitlines()]
    for at, line in enumerate(lines):
        if re.match(r"[\w.]*(Error|Exception): ", line):
            return " ".join(lines[at : at + 2]).partition("[type=")[0][:400]
    return lines[-1] if lines else "without a word"
