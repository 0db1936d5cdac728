"""Options of runs that judge artifacts, move them or ask what fits; those of runs that write them: options.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmquant.errors import InputError

from ..convert.hub.hubs import DEFAULT_HUB, HUBS
from .option import SEEDS, Checked, option


@dataclass(frozen=True)
class EvalOptions(Checked):
    """Options of `eval`. None: chosen by the model, the device or the convention."""

    text: tuple[str, ...] = option((), "File, folder or `default`, [DOMAIN=]PATH; default: the bundled texts.")
    context: int | None = option(None, "Tokens in a window; default 512 for the demo, else 2048.", least=2)
    stride: int | None = option(None, "Tokens from one window to the next; default: the context.", least=1)
    windows: int | None = option(None, "Windows in all; default 64 for the demo, else 128.", least=1)
    convention: str = option(
        "all", "Which positions of a window are scored (docs/eval.md).", choices=("all", "llama.cpp")
    )
    activations: str | None = option(
        None,
        "llama.cpp: rounded as its CPU backend rounds them; default with --convention llama.cpp, else exact.",
        choices=("exact", "llama.cpp"),
    )
    seed: int = option(0, "Seed of the bootstrap.", least=0, most=SEEDS)
    dtype: str | None = option(None, "Type of matrix products; default: bf16 on CUDA.", choices=("float32", "bfloat16"))
    engine_like: tuple[str, ...] = option(
        (), "Also as an engine computes it: vllm-h100, llama.cpp ... (docs/eval.md); repeatable.", metavar="PROFILE"
    )
    floor: bool = option(False, "Also the reference against itself: other dtype, sums and batches in other orders.")
    floor_runs: int = option(1, "With --floor: how many other orders of each.", least=0, most=16)
    better_than: tuple[str, ...] = option(
        (),
        "Claim to prove (else exit 4): nearer than this ARTIFACT, or than those of an eval --json file.",
        metavar="RIVAL",
    )
    save_reference: Path | None = option(None, "Store the reference's distributions in this file.", kind="path")
    reference_logits: Path | None = option(None, "Take them from such a file.", kind="path")
    engine: str = option("mmquant", "Run this engine too, if installed.", choices=("mmquant", "llama.cpp", "vllm"))
    tensor_parallel: int | None = option(None, "GPUs that vLLM splits a model over; default: 1, 2 or 4.", least=1)
    engine_arg: tuple[str, ...] = option(
        (), "An argument for --engine vllm: gpu_memory_utilization=0.5; repeatable.", metavar="KEY=VALUE"
    )
    cache: str | None = option(
        None, "KV cache of --engine and --engine-like; default: theirs.", choices=("16bit", "fp8", "q8_0", "q4_0")
    )
    state: Path | None = option(None, "Folder in which an interrupted run leaves what it has.", kind="path")
    batch_tokens: int | None = option(None, "Tokens that go through a layer at once.", least=1)


@dataclass(frozen=True)
class VerifyOptions(Checked):
    """Options of `verify`. timeout: seconds."""

    served_model: str | None = option(None, "The model's name at the server; default: the only one it lists.")
    against: str | None = option(None, "A second server, the reference: compared prompt by prompt.", metavar="URL")
    language: tuple[str, ...] = option((), "Prompts of this language alone; repeatable.")
    prompts: Path | None = option(None, "Prompts of your own: YAML in the form of the bundled ones.", kind="path")
    loops: int = option(1, "How often each prompt is asked; MiniMax asks ten times.", least=1)
    concurrency: int = option(5, "Requests at a time.", least=1, most=256)
    timeout: int = option(600, "Seconds for one answer.", least=1)
    retries: int = option(3, "Further tries of a request that got no answer.", least=0)
    max_tokens: int = option(8192, "Tokens of one answer at most.", least=1)
    stream: bool = option(False, "Ask for streams, as agents do.")
    key_variable: str = option("OPENAI_API_KEY", "The environment variable that holds the server's key.")
    state: Path | None = option(None, "Folder that keeps the answers: the same command continues there.", kind="path")


@dataclass(frozen=True)
class DoctorOptions(Checked):
    """Options of `doctor`."""

    statistics: Path | None = option(
        None, "What `mmquant calibrate --out` wrote: its maxima show what overflows.", kind="path"
    )
    text: tuple[str, ...] = option((), "Measure by running this text (or `default`) through the file.")
    windows: int = option(32, "Windows at most, for --text.", least=1)
    context: int | None = option(None, "Tokens in a window; default 512 for the demo, else 2048.", least=2)
    fix: bool = option(False, "Rescale the experts that overflow, exactly.")
    out: Path | None = option(
        None, "Folder for the fixed copy; default: FILE's folder with -fixed appended.", kind="path"
    )
    in_place: bool = option(False, "Fix the file itself instead of a copy.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fix and self.statistics is None and not self.text:
            raise InputError("--fix: needs --statistics or --text to know which experts overflow")
        if self.in_place and self.out is not None:
            raise InputError("--in-place and --out: choose one")


@dataclass(frozen=True)
class PullOptions(Checked):
    """Options of `pull`."""

    include: tuple[str, ...] = option((), "Only files like this; may be repeated.", metavar="GLOB")
    transport: str = option("http", "http: resumable ranges; xet: the hub's accelerated path.", choices=("http", "xet"))


@dataclass(frozen=True)
class PushOptions(Checked):
    """Options of `push`."""

    hub: str = option(DEFAULT_HUB.key, "Hugging Face, ModelScope.", choices=tuple(HUBS))
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch; default: main, on ModelScope master.")
    pr: bool = option(False, "Into a pull request (Hugging Face).")
    delete_after_upload: bool = option(False, "Delete each weight file once it is committed.")
    base_card: Path | None = option(None, "The base model's README.md.", kind="file")
    base_model: str | None = option(
        None, "The card's base_model; default: the repository that was read.", metavar="ORG/NAME"
    )
    license: str | None = option(None, "The card's licence; default: the base model's.", metavar="ID")

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.license
        if name is not None and (not name.strip() or not name.isprintable() or len(name) > 96):
            raise InputError(f"--license {name[:96]!r}: expected a licence's id or its name, one line")


@dataclass(frozen=True)
class FitOptions(Checked):
    """Options of `fit`. type: a type, a format, or the first word of several (gguf, int4); None: all."""

    type: str | None = option(None, "Q4_K_M, int4-g128, fp8-block ..., or gguf, int4, nvfp4 ...; default: all.")
    gpu: str | None = option(None, "One card, xN for several: 24GB, 80GBx2. 24GB is a 24 GB card, 24e9 its bytes.")
    ram: str | None = option(None, "RAM: 96GB; default with --gpu: 16GB.")
    target: str | None = option(None, "A machine of the table, such as 24GB+96GB or 2xA100-80GB.", metavar="ID")
    targets: Path | None = option(None, "More machines: a YAML file like the package's table.", kind="path")
    context: int | None = option(None, "Tokens; default: the largest that leaves 1 GiB free.", least=1)
    kv_cache: str | None = option(
        None, "Type of the KV cache; default: f16, or what the artifact says.", choices=("f16", "q8_0", "fp8")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and (self.gpu is not None or self.ram is not None):
            raise InputError("--target with --gpu or --ram: choose one, a machine of the table or your own")
