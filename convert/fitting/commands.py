"""Complete commands that start an artifact under each engine as it was placed; none for what does not fit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from ..hub.hubs import HUBS
from ..hub.interface import Hub
from ..models.architecture import Architecture
from . import memory
from .catalog import GGUF, MLX
from .verdict import NO, Fit

MERGED = "merged.gguf"
SEQUENCES = 8  # vLLM and SGLang: requests at once, which share the cache
SGLANG_SHARE = "0.88"  # of a card, weights and cache
CPU_EXPERTS = r"\.ffn_(gate|up|down)_exps=CPU"


@dataclass(frozen=True)
class Command:
    """A command line of an engine, words and environment; `note`: what it is for, where it is not the plain one."""

    engine: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict[str, str])
    note: str = ""

    @property
    def line(self) -> str:
        """As it is typed; a script without the shell that would run it."""
        if self.argv[:2] == ("sh", "-c"):
            return self.argv[2]
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in self.env.items()), shlex.join(self.argv)])


def commands(fit: Fit, model: Architecture, entry: str, parts: int = 1, asked: bool = False) -> list[Command]:
    """Every engine that runs the artifact, the first choice first.

    entry: the folder or (first) file, or hf:ORG/NAME[@REV][:TYPE]; parts: files of a split GGUF; asked: the cache type
    was asked for, and is not what the artifact implies.
    """
    if fit.verdict == NO:
        return []
    if fit.row.family == MLX:
        return [Command("mlx_lm", ("mlx_lm.server", "--model", _hub(entry)[1], "--trust-remote-code"))]
    if fit.row.family != GGUF:
        return [_vllm(fit, model, entry, asked), _sglang(fit, model, entry, asked)]
    found = [_llama(fit, entry)]
    return [*found, *_others(fit, model, entry, parts), _speculating(found[0])]


def _hub(entry: str) -> tuple[Hub | None, str, str | None]:
    """(hub, ORG/NAME[:TYPE], revision) of an entry hf:ORG/NAME[@REV][:TYPE]; no hub for a path."""
    key, _, rest = entry.partition(":")
    if key not in HUBS:
        return None, entry, None
    place, _, kind = rest.partition(":")
    repo, _, revision = place.partition("@")
    return HUBS[key], f"{repo}:{kind}" if kind else repo, revision or None


def _folder(entry: str) -> tuple[str, list[str], dict[str, str]]:
    """What vLLM and SGLang are given of a folder: its place, words for its revision, environment."""
    hub, place, revision = _hub(entry)
    environment = {} if hub is None else dict(hub.vllm_environment)
    return place, ["--revision", revision] if revision else [], environment


def _vllm(fit: Fit, model: Architecture, entry: str, asked: bool) -> Command:
    place, serving = fit.placement, model.serving
    folder, revision, environment = _folder(entry)
    argv = ["vllm", "serve", folder, *revision, "--tensor-parallel-size"]
    argv.append(str(place.tensor_parallel))
    argv += ["--enable-expert-parallel"] * place.expert_parallel
    argv += ["--max-model-len", str(place.context), "--gpu-memory-utilization", str(memory.VLLM_SHARE)]
    argv += ["--max-num-seqs", str(SEQUENCES), "--trust-remote-code"]
    argv += ["--kv-cache-dtype", "fp8"] * (asked and place.cache == "fp8")
    argv += ["--enable-auto-tool-choice", *serving.vllm] if serving else []
    return Command("vllm", tuple(argv), {"SAFETENSORS_FAST_GPU": "1", **environment})


def _sglang(fit: Fit, model: Architecture, entry: str, asked: bool) -> Command:
    place, serving = fit.placement, model.serving
    folder, revision, environment = _folder(entry)
    environment = {name.replace("VLLM", "SGLANG"): value for name, value in environment.items()}
    argv = ["python", "-m", "sglang.launch_server", "--model-path", folder, *revision]
    argv += ["--tp-size", str(place.tensor_parallel)]
    argv += ["--ep-size", str(place.tensor_parallel)] * place.expert_parallel
    argv += ["--context-length", str(place.context), "--mem-fraction-static", SGLANG_SHARE]
    argv += ["--max-running-requests", str(SEQUENCES), "--trust-remote-code"]
    argv += ["--kv-cache-dtype", "fp8_e4m3"] * (asked and place.cache == "fp8")
    return Command("sglang", (*argv, *(serving.sglang if serving else ())), environment)


def _llama(fit: Fit, entry: str) -> Command:
    place = fit.placement
    layers = "99" if fit.target.cards is not None or fit.target.unified else "0"
    hub, name, _ = _hub(entry)
    argv = ["llama-server", "-m" if hub is None else "-hf", name, "-c", str(place.context), "-ngl", layers]
    argv += ["--n-cpu-moe", str(place.cpu_layers)] if place.cpu_layers else []
    argv += ["-ts", ",".join(map(str, place.split))] if place.split else []
    argv += ["-fa", "on"]
    argv += ["-ctk", place.cache, "-ctv", place.cache] if place.cache != "f16" else []
    return Command("llama.cpp", (*argv, "-np", "1", "--jinja"), dict(hub.llamacpp_environment) if hub else {})


def _speculating(command: Command) -> Command:
    """The same with drafts from the text itself: it helps where answers repeat their prompt (code edits)."""
    return Command(
        command.engine, (*command.argv, "--spec-type", "ngram-mod"), command.env, "ngram speculation, an option"
    )


def _others(fit: Fit, model: Architecture, entry: str, parts: int) -> list[Command]:
    """Ollama and LM Studio: they place layers themselves, experts in RAM are not for Ollama."""
    found: list[Command] = []
    hub, name, _ = _hub(entry)
    if hub is not None:  # LM Studio takes a file
        local = parts == 1 and fit.placement.cpu_layers == 0 and hub.ollama
        return [Command("ollama", ("ollama", "run", f"{hub.ollama}/{name}"))] if local else []
    if fit.placement.cpu_layers == 0:
        file = f"./{MERGED}" if parts > 1 else entry if entry[0] in "./" else f"./{entry}"
        merge = [shlex.join(["llama-gguf-split", "--merge", entry, MERGED])] if parts > 1 else []
        settings = ""
        if model.serving is not None:
            settings = "".join(f"PARAMETER {key} {value}\\n" for key, value in model.serving.sampling.items())
        text = f"FROM {file}\\nPARAMETER num_ctx {fit.placement.context}\\n{settings}"
        steps = [*merge, f"printf {shlex.quote(text)} > Modelfile", "ollama create mmquant -f Modelfile"]
        found.append(Command("ollama", ("sh", "-c", " && ".join([*steps, "ollama run mmquant"]))))
    load = ["lms", "load", "mmquant", "--context-length", str(fit.placement.context), "--gpu", "max"]
    note = (
        "" if fit.placement.cpu_layers == 0 else f"in its settings: experts of {fit.placement.cpu_layers} layers on CPU"
    )
    text = " && ".join([shlex.join(["lms", "import", entry, "--user-repo", "mmquant/mmquant"]), shlex.join(load)])
    return [*found, Command("lm studio", ("sh", "-c", text), note=note)]


def override_tensor(fit: Fit) -> str:
    """The -ot that says what --n-cpu-moe says, for engines and versions without it; empty when no expert is in RAM."""
    count = fit.placement.cpu_layers
    return rf"blk\.({below(count)}){CPU_EXPERTS}" if count else ""


def below(count: int) -> str:
    """A regular expression of the numbers from 0 to count - 1."""
    if count > 100:
        return "|".join(map(str, range(count)))
    tens, ones = divmod(count, 10)
    parts = [f"[0-{min(count, 10) - 1}]"]
    parts += [f"[1-{tens - 1}][0-9]"] if tens > 1 else []
    parts += [f"{tens}[0-{ones - 1}]"] if tens and ones else []
    return "|".join(parts)
