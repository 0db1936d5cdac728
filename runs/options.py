"""Options of every run, with the names, defaults and help of the command line, which is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ..convert.hub.hubs import DEFAULT_HUB, HUBS

GIB = 1 << 30
SEEDS = 2**32 - 1  # what numpy and torch take
PLAN_FIELDS = ("plan", "size", "target", "target_context", "sensitivity", "judged_windows")
BESIDE = ("8bit", "6bit", "5bit", "4bit", "3bit", "bf16", "mlx")  # how MLX may have what is beside the experts
PLANNED = ("gguf", "int4", "nvfp4", "mxfp4", "mlx")  # commands that write a plan
METHOD = "gptq: calibrated error feedback; rtn: to nearest, no calibration."
LAYOUT = "Whose layout the folder has, which decides the engines (docs/formats.md)."
ATTENTION = "How attention's matrices are stored."
TEXT_ONLY = "--text alone; by default as many windows of bundled text go with it."


def option(default: object = None, text: str | None = None, **how: object) -> Any:  # noqa: ANN401 - as dataclasses.field
    """A field that is also an option.

    how: `choices`, `least` and `most`, `kind` (size, path, file, layers), `shown` for the default.
    """
    return field(default=default, metadata={"help": text, **how})


class Checked:
    """Values are held against what the field allows, as the command line holds what is typed: InputError."""

    def __post_init__(self) -> None:
        for found in fields(self):  # type: ignore[arg-type]
            value, allowed = getattr(self, found.name), found.metadata
            flag = f"--{found.name.replace('_', '-')} {value}"
            if value is None:
                continue
            if "choices" in allowed and value not in allowed["choices"]:
                raise InputError(f"{flag}: expected one of {', '.join(map(str, allowed['choices']))}")
            if "least" in allowed and not allowed["least"] <= value <= allowed.get("most", value):
                more = (
                    f"{allowed['least']} to {allowed['most']}" if "most" in allowed else f"{allowed['least']} or more"
                )
                raise InputError(f"{flag}: expected {more}")


@dataclass(frozen=True)
class TextOptions(Checked):
    """Calibration text: which, how much of it, and what it must not overlap."""

    text: tuple[str, ...] = option((), "Calibration text: file, folder or `default`, PATH[=WEIGHT]; repeatable.")
    evaluation: tuple[str, ...] = option((), "Text that must not overlap; default: the bundled evaluation text.")
    context: int | None = option(None, "Tokens in a window; default 512 for the demo, else 2048.", least=2)
    windows: int = option(256, "Windows at most.", least=1)
    seed: int = option(0, "Seed of the documents' order.", least=0, most=SEEDS)
    text_only: bool = option(True, TEXT_ONLY)


@dataclass(frozen=True)
class CalibrateOptions(TextOptions):
    """Options of `calibrate`. memory, disk: bytes; layers: only the first ones, as a range from 0."""

    moments: str | None = option(None, "What is kept; default: full up to 16 GiB.", choices=("full", "diagonal"))
    store: str = option("float32", "Type of the stored second moments.", choices=("float32", "bfloat16"))
    weighting: str = option(
        "router", "How an expert's rows count: by router weight, or all alike.", choices=("router", "uniform")
    )
    experts: str = option("routed", "Which tokens an expert sees; all: for comparison.", choices=("routed", "all"))
    propagate: str = option("reference", "`reference`, or a quantized artifact.")
    memory: int | None = option(None, "Bytes for accumulators, for example 8GB; default: what is free.", kind="size")
    disk: int = option(64 * GIB, "Bytes for hidden states on disk.", kind="size", shown="64GiB")
    skip_nonfinite: bool = option(False, "Leave out rows with NaN or infinity instead of stopping.")
    imatrix: Path | None = option(None, "Also write llama.cpp's importance matrix to this .gguf file.", kind="path")
    layers: range | None = option(None, "Only the first B layers (development).", kind="layers", metavar="0:B")
    dtype: str | None = option(None, "Type of matrix products; default: bf16 on CUDA.", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.imatrix is not None and self.imatrix.suffix != ".gguf":
            raise InputError(f"--imatrix {self.imatrix}: expected a name ending in .gguf")


@dataclass(frozen=True)
class PruneOptions(Checked):
    """Which experts stay: those of a list, or so many of each layer by what `calibrate` saw of them."""

    experts_kept: Path | None = option(
        None, "JSON: of every layer the list of the experts that stay; router and bias are cut to match.", kind="path"
    )
    experts: int | None = option(None, "How many experts of each layer stay, by saliency (REAP).", least=1)
    statistics: Path | None = option(None, "What `calibrate --out` wrote, for --experts.", kind="path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts_kept is not None and self.experts is not None:
            raise InputError("--experts contradicts --experts-kept: expected one of them")
        if (self.experts is None) != (self.statistics is None):
            raise InputError("--experts needs --statistics, and the other way round")


@dataclass(frozen=True)
class Bf16Options(PruneOptions):
    """Options of `bf16`. max_shard_size: bytes."""

    max_shard_size: int = option(5 * 10**9, "Largest output shard, for example 5GB.", kind="size", shown="5GB")


@dataclass(frozen=True)
class Fp8Options(PruneOptions):
    """Options of `fp8`. max_shard_size: bytes."""

    scheme: str = option(
        "block",
        "block: the release's tiles; channel: a scale per output; native: a copy.",
        choices=("block", "channel", "native"),
    )
    max_shard_size: int = option(5 * 10**9, "Largest output shard, for example 5GB.", kind="size", shown="5GB")


@dataclass(frozen=True)
class BudgetOptions(TextOptions):
    """What a planned artifact may take; size: bytes of the file, or of a folder's weights."""

    text_only: bool = option(False, TEXT_ONLY)
    size: int | None = option(None, "Largest file (of a folder: all shards), for example 98GB or 98GiB.", kind="size")
    target: str | None = option(
        None, "A machine: a target of `mmquant fit` (24GB+96GB, 2xA100-80GB ...), or CARD+RAM.", metavar="CARD+RAM"
    )
    target_context: int = option(32768, "Tokens that --target holds in its cache (f16).", least=256)
    sensitivity: Path | None = option(
        None, "What `plan` measured (sensitivity.json); default: measured now, and kept.", kind="path"
    )
    judged_windows: int | None = option(
        None, "Windows of the text that judge the plan; default 24 for the demo, else 4.", least=1
    )


@dataclass(frozen=True)
class PlannedOptions(BudgetOptions):
    """Options of a command that writes a plan, or makes one first. InputError for two of them."""

    plan: Path | None = option(None, "What `mmquant plan` made.", kind="path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(value is not None for value in (self.plan, self.size, self.target)) > 1:
            raise InputError("--plan, --size, --target: expected one of them")

    @property
    def planned(self) -> bool:
        """Whether a plan chooses the types."""
        return any(value is not None for value in (self.plan, self.size, self.target))


@dataclass(frozen=True)
class PlanOptions(BudgetOptions):
    """Options of `plan`: one of size, bits and target."""

    bits: float | None = option(None, "Bits per weight, over all tensors together.", kind="bits")
    format: str = option("gguf", "The command that the plan is for.", choices=PLANNED)
    tp: int = option(2, "Tensor parallelism that a folder must load at; with --target its cards.", least=1)


@dataclass(frozen=True)
class CalibratedOptions(PlannedOptions):
    """What all commands that write calibrated folders have in common. InputError for what contradicts itself."""

    method: str = option("gptq", METHOD, choices=("gptq", "rtn"))
    effort: str = option(
        "default",
        "fast rounds under diagonal moments, without error feedback; high learns rounding, on four times the windows "
        "(ten times as long).",
        choices=("fast", "default", "high"),
    )
    statistics: Path | None = option(None, "What `calibrate --out` wrote.", kind="path")
    propagate: str | None = option(
        None,
        "What the next layer's calibration sees; default: reference, with --effort high quantized.",
        choices=("reference", "quantized"),
    )
    max_shard_size: int = option(5 * 10**9, "Largest output shard, for example 5GB.", kind="size", shown="5GB")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "rtn":
            return
        if self.effort == "high":
            expected = " or ".join(self.calibrated)
            raise InputError(f"--effort high --method rtn: rounding to nearest is not refined, expected {expected}")
        if self.statistics is not None:
            raise InputError("--method rtn --statistics: round to nearest uses no statistics")

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Methods that calibrate."""
        allowed = {found.name: found.metadata for found in fields(self)}
        return tuple(method for method in allowed["method"]["choices"] if method != "rtn")


@dataclass(frozen=True)
class WeightsOptions(CalibratedOptions):
    """What `int4`, `nvfp4` and `mxfp4` have in common. InputError for what contradicts itself."""

    format: str = option("compressed-tensors", LAYOUT, choices=("compressed-tensors",))
    attention: str = option("bf16", ATTENTION, choices=("bf16", "fp8", "fp8-channel"))
    kv_cache: str = option(
        "bf16",
        "fp8: calibrated scales for an FP8 cache, which vLLM and SGLang then use by themselves; it costs quality.",
        choices=("bf16", "fp8"),
    )
    tp: int = option(2, "Tensor parallelism that the folder must load at.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        other = self.format != WeightsOptions.format
        if self.planned and (self.method == "awq" or other):
            said = f"--format {self.format}" if other else f"--method {self.method}"
            raise InputError(
                f"{said} with a plan: expected compressed-tensors by gptq or rtn, which widths may vary in"
            )
        if self.method == "rtn" and self.kv_cache == "fp8":
            expected = " or ".join(self.calibrated)
            raise InputError(f"--kv-cache fp8 --method rtn: the scales are calibrated, expected {expected}")


@dataclass(frozen=True)
class Int4Options(WeightsOptions):
    """Options of `int4`. InputError for what contradicts itself (what a format cannot hold: runs/int4.py)."""

    method: str = option(
        "gptq", "gptq, awq: calibrated; rtn: to nearest, no calibration.", choices=("gptq", "awq", "rtn")
    )
    format: str = option("compressed-tensors", LAYOUT, choices=("compressed-tensors", "awq", "gptq"))
    group_size: int = option(128, "Inputs that share a scale; -1: a whole row.", choices=(32, 64, 128, -1))
    attention: str = option("bf16", ATTENTION, choices=("bf16", "fp8", "fp8-channel", "int4"))
    eight_bit: str | None = option(None, "Layers kept at 8 bits, for example 0,60-61.", metavar="LAYERS")
    effort: str = option(
        "default",
        "gptq: fast rounds under diagonal moments, without error feedback; high learns rounding, on four times the "
        "windows (ten times as long). awq: high adds error feedback, fast is as default.",
        choices=("fast", "default", "high"),
    )
    asymmetric: bool = option(False, "Zero points (always with --format awq).")


@dataclass(frozen=True)
class Nvfp4Options(WeightsOptions):
    """Options of `nvfp4`."""

    format: str = option("compressed-tensors", LAYOUT, choices=("compressed-tensors", "modelopt"))
    attention: str = option("bf16", ATTENTION, choices=("bf16", "fp8", "fp8-channel", "nvfp4"))
    activations: str = option(
        "bf16",
        "nvfp4: calibrated scales for FP4 activations (W4A4), which Blackwell computes in; others then ignore them.",
        choices=("bf16", "nvfp4"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations != "bf16" and self.method == "rtn":
            raise InputError("--activations nvfp4 --method rtn: the scales are calibrated, expected gptq")


@dataclass(frozen=True)
class Mxfp4Options(WeightsOptions):
    """Options of `mxfp4`."""

    attention: str = option("bf16", ATTENTION, choices=("bf16", "fp8", "fp8-channel", "mxfp4"))


@dataclass(frozen=True)
class MlxOptions(CalibratedOptions):
    """Options of `mlx` (what a mode does not have: runs/mlx.py)."""

    bits: int = option(4, "Of the experts, in mode affine.", choices=(2, 3, 4, 5, 6, 8))
    group_size: int = option(64, "Inputs that share a scale, in mode affine.", choices=(32, 64, 128))
    mode: str = option("affine", "nvfp4: with a global scale for each expert.", choices=("affine", "mxfp4", "nvfp4"))
    attention: str = option("8bit", "3bit to 8bit: affine, groups of 64; mlx: as the experts.", choices=BESIDE)
    embeddings: str = option("8bit", "Of the embeddings and the head, likewise.", choices=BESIDE)


@dataclass(frozen=True)
class GgufOptions(PlannedOptions):
    """Options of `gguf`. type: any mix of llama-quantize; tensor_type: REGEX=TYPE; max_part_size: bytes."""

    type: str = option("Q4_K_M", "Any mix of llama-quantize: Q4_K_M, IQ3_XXS ...")
    tensor_type: tuple[str, ...] = option((), "REGEX=TYPE, as in llama-quantize; the first match wins.")
    plan: Path | None = option(None, "What `mmquant plan` made, or JSON: tensor name -> type.", kind="path")
    name: str | None = option(None, "Name of the file without .gguf; default: model and type.")
    max_part_size: int = option(48 * 10**9, "Largest file; more become -00001-of-0000N.", kind="size", shown="48GB")
    statistics: Path | None = option(
        None, "Instead of text: what `calibrate --out` wrote, or an imatrix .gguf.", kind="path"
    )
    effort: str = option(
        "default",
        "fast: a weighted search; default: correction and error feedback; high: on four times as many windows.",
        choices=("fast", "default", "high"),
    )
    no_calibration: bool = option(False, "Every weight to its nearest point; no text is read.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistics is not None and (self.text or self.no_calibration):
            raise InputError("--statistics: stands instead of --text, and contradicts --no-calibration")


@dataclass(frozen=True)
class EvalOptions(Checked):
    """Options of `eval`. None: chosen by the model, the device or the convention."""

    text: tuple[str, ...] = option((), "File or folder, [DOMAIN=]PATH; default: the bundled texts.")
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
