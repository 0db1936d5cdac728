"""What a storage format must say and do. A module of this folder fills in one `Format`; table.py lists them.

Shapes are logical: a matrix is [O, I], outputs by inputs. Stacks of matrices have leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.grid import IntWeight
from ..models.names import TensorNames
from .skip_lists import ENGINES
from .spec import TensorSpec

Shape = tuple[int, int]  # (outputs, inputs)
Found = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of a module's tensors by suffix
Fetch = Callable[[str], Tensor]  # a part by its suffix, on the device, with any leading dimensions
FLOATS = ("BF16", "F16", "F32")  # what scales may be


class PartError(InputError):
    """A tensor of a matrix holds what no reader can use; whoever reads adds the file and the matrix."""

    def __init__(self, suffix: str, fault: str) -> None:
        super().__init__(f"{suffix} {fault}")
        self.suffix = suffix


@dataclass(frozen=True)
class Part:
    """One tensor of a stored matrix. `dtypes`: those that are read, the first is written."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    needed: bool = True  # False: it is written for engines that want to see it, and not read
    single: bool = False  # of [O, 1]: [O], and one value for the whole matrix, are read as well


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored. `group`: inputs that share a scale, -1 a whole row; `block`: (rows, columns) of FP8.

    whole: one scale for the matrix; dense: codes of 3, 5, 6 and 7 bits follow each other across the bounds of words
    activations: 4 where engines quantize those to FP4, else 16
    """

    format: Format
    bits: int
    group: int = -1
    symmetric: bool = True
    block: tuple[int, int] | None = None
    act_order: bool = False
    zeros_plus_one: bool = True  # GPTQ v1 stores zero points minus one
    whole: bool = False
    dense: bool = True
    activations: int = 16

    @property
    def label(self) -> str:
        """What compressed-tensors usually calls a config group of it."""
        return self.format.label.format(bits=self.bits, activations=self.activations)


@dataclass(frozen=True)
class BlockScales:
    """Scales of blocks in E4M3 as they are stored [n, O, G] float32, which blocks hold something, and the units [n]."""

    scales: Tensor
    live: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Method:
    """A quant_method of config.json and how engines look matrices up under it.

    read      (its formats, quantization_config, an engine's names of a matrix, engine) -> Scheme, None: left as it is
    single    one lookup per projection of a layer's experts, else one for all of them
    fused     q, k and v are looked up as qkv_proj
    list_key  the key whose absence makes vLLM go by the dtypes in the files
    files     (quantization_config) -> objects of further JSON files by name, which engines look for
    engines   who reads it
    top_key   the key of config.json that stands for quant_method and holds the settings (copied in quantization_config)
    stacked   the experts of a layer lie in one tensor a projection
    outside   router, embeddings and head may be quantized
    left_out  fields of LayerWeights that its writer leaves out and its engine does without: they count as zeros
    named     whether its settings name a module; others are as their tensors are
    derive    (its formats, a module's tensors, shape) -> scheme of a module that is not named
    entry     scheme -> what the settings say of a module
    framework what the headers of its shards say of whom they are for
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[Format], dict[str, Any], tuple[str, ...], str], Scheme | None]
    single: bool = False
    fused: bool = False
    list_key: str | None = None
    files: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    engines: tuple[str, ...] = ENGINES
    top_key: str = ""
    stacked: bool = False
    outside: bool = False
    left_out: tuple[str, ...] = ()
    named: Callable[[Mapping[str, Any], str], bool] | None = None
    derive: Callable[[Sequence[Format], Found, Shape], Scheme | None] | None = None
    entry: Callable[[Scheme], dict[str, Any]] | None = None
    framework: str = "pt"


@dataclass(frozen=True, repr=False)
class Format:
    """One storage format: the functions that read and write it, and what is true of it.

    parts    the tensors of a matrix, in the order in which they are written
    unpack   their values -> [..., O, I] float32. PartError for values that make no sense
    nearest  weights [E, O, I] float32 rounded to nearest -> tensors [E, ...] by suffix; names for messages
    pack     the same of integer codes that a calibrated method found; None: no such method
    group    its entry of compressed-tensors' config_groups for some targets; None: the format is no part of a mixture
    config   quantization_config of a folder whose experts (True: attention too) are stored so, the rest unquantized
    """

    name: str  # in messages; with compressed-tensors the `format` of config.json
    method: Method
    bits: tuple[int, ...]
    parts: Callable[[Scheme, Shape], list[Part]]
    unpack: Callable[[Scheme, Shape, Fetch], Tensor]
    nearest: Callable[[list[str], Tensor, Scheme], dict[str, Tensor]] | None = None
    pack: Callable[[list[str], IntWeight], dict[str, Tensor]] | None = None
    group: Callable[[list[str], Scheme], dict[str, Any]] | None = None
    config: Callable[[Scheme, bool, TensorNames], dict[str, Any]] | None = None
    kind: str = ""  # what the settings call it, where not by its name
    label: str = ""  # of its config group, {bits} filled in
    manifest: str = "safetensors"  # the manifest's format
    command: str = ""  # the command that writes it, and the word of its --format or --scheme
    choice: str = ""
    strategies: tuple[str, ...] = ("tensor", "channel", "group")  # of compressed-tensors that it stands for
    group_sizes: tuple[int, ...] | None = None  # that may be; None: any
    symmetric: tuple[bool, ...] = (True,)  # that may be written; the first is the default
    whole_words: bool = False  # outputs and inputs must fill 32-bit words
    beside: tuple[str, ...] = ()  # more suffixes that may lie beside its parts
    requantizable: bool = False  # FP8: close enough to the original to be quantized again
    fuses: bool = False  # gate and up, and q, k and v, share scales of the whole matrix
    experts_only: bool = False  # engines have it for experts alone
    activations: tuple[int, ...] = (16,)  # bits that may be written
    more_bits: tuple[int, ...] = ()  # that are read, and never written
    otherwise: Callable[[Scheme], Scheme | None] | None = None  # another way in which the same settings were written
    block_scales: Callable[[Fetch], BlockScales] | None = None  # of matrices [n, ...], where they are E4M3
    input_scale: Callable[[Tensor], dict[str, Tensor]] | None = None  # largest inputs [E] -> tensors [E, ...] of them

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def reads(self, bits: object) -> bool:
        """Whether config.json may say so many bits."""
        return type(bits) is int and bits in self.bits + self.more_bits

    @property
    def tiled(self) -> bool:
        """Whether its scales are those of two-dimensional tiles."""
        return self.strategies == ("block",)

    @property
    def mixes(self) -> bool:
        """Whether other formats, and scales of an FP8 KV cache, may stand beside it in one folder."""
        return self.group is not None


def specs(scheme: Scheme, name: str, shape: Shape, scale_dtype: str | None = None) -> list[TensorSpec]:
    """The tensors that are written of a matrix `name` (without .weight); `scale_dtype`: of scales carried as they are.

    InputError for a shape that the format cannot hold.
    """
    per_word = 32 // scheme.bits
    if scheme.format.whole_words and (shape[0] % per_word or shape[1] % per_word):
        where = f"for format {scheme.format.name}"
        raise InputError(f"{name}: {shape[0]} x {shape[1]}, expected multiples of {per_word} {where}")
    return [
        TensorSpec(f"{name}.{p.suffix}", scale_dtype if scale_dtype and p.dtypes == FLOATS else p.dtypes[0], p.shape)
        for p in scheme.format.parts(scheme, shape)
    ]


def check_writable(scheme: Scheme) -> None:
    """InputError for bits, groups or zero points that are not written in a format."""
    row = scheme.format
    if row.group_sizes is not None and scheme.group not in row.group_sizes:
        expected = " or ".join(map(str, row.group_sizes))
        raise InputError(f"format {row.name}: groups of {scheme.group}, expected {expected}")
    if scheme.bits not in row.bits:
        raise InputError(f"format {row.name}: {scheme.bits} bits, expected {' or '.join(map(str, row.bits))}")
    if scheme.activations not in row.activations:
        expected = " or ".join(map(str, row.activations))
        raise InputError(f"format {row.name}: activations of {scheme.activations} bits, expected {expected}")
    if scheme.symmetric not in row.symmetric:
        found, expected = ("symmetric", "asymmetric") if scheme.symmetric else ("asymmetric", "symmetric")
        raise InputError(f"format {row.name}: {found}, expected {expected} (engines read no other)")
