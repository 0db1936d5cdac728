"""Options of runs that write artifacts, calibrate or plan; the command line has their names, defaults and help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from mmquant.errors import InputError

from .option import SEEDS, Checked, option

GIB = 1 << 30
PLAN_FIELDS = ("plan", "size", "target", "target_context", "sensitivity", "judged_windows")
BESIDE = ("8bit", "6bit", "5bit", "4bit", "3bit", "bf16", "mlx")  # how MLX may have what is beside the experts
PLANNED = ("gguf", "int4", "nvfp4", "mxfp4", "mlx")  # commands that write a plan
METHOD = "gptq: calibrated error feedback; rtn: to nearest, no calibration."
LAYOUT = "Whose layout the folder has, which decides the engines (docs/formats.md)."
ATTENTION = "How attention's matrices are stored."
TEXT_ONLY = "--text alone; by default twice as many windows of bundled text go with it."


@dataclass(frozen=True)
class TextOptions(Checked):
    """Calibration text: which, how much of it, and what it must not overlap."""

    text: tuple[str, ...] = option((), "Calibration text: file, folder or `default`, PATH[=WEIGHT]; repeatable.")
    evaluation: tuple[str, ...] = option(
        (), "Text that must not overlap; by default the bundled evaluation text (`default`)."
    )
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
        if self.method == "rtn" and self.effort != "default":
            expected = " or ".join(self.calibrated)
            said = f"--effort {self.effort} --method rtn: rounding to nearest"
            raise InputError(f"{said} is not refined, expected {expected}")
        if self.statistics is None:
            return
        if self.method == "rtn":
            raise InputError("--method rtn --statistics: round to nearest uses no statistics")
        if self.propagate == "quantized" or (self.effort == "high" and self.method == "gptq"):
            what = "--propagate quantized" if self.propagate == "quantized" else "--effort high"
            raise InputError(f"{what} needs the calibration tokens, --statistics holds only sums")

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
        "windows (ten times as long). awq: high adds error feedback.",
        choices=("fast", "default", "high"),
    )
    asymmetric: bool = option(False, "Zero points (always with --format awq).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "awq" and self.effort == "fast":
            raise InputError("--effort fast --method awq: it has no faster way, expected default or high")


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
