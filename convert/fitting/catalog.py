"""Every type and format that mmquant writes, as rows with their bytes: the table of storage formats and the mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from mmquant.errors import InputError

from ..folder.mlx import EIGHT_BIT
from ..folder.weights import ATTENTION_FP8, GROUP_SIZES
from ..formats.format import Format, Scheme
from ..formats.fp8_block import TILE
from ..formats.table import FORMATS, choices
from ..gguf.mixes import ALIASES, MIXES, PLAIN, Mix
from ..models.geometry import Geometry
from .weights import Weights, folder_weights, mix_weights

GGUF, MLX, FOLDER = "gguf", "mlx", "folder"  # families: which engines run a row


@dataclass(frozen=True)
class Row:
    """One type or format.

    id        what --type takes
    family    gguf (llama.cpp), mlx, or folder (vLLM, SGLang)
    format    the manifest's format
    command   the words of the command that writes it
    group     inputs that share a scale, which tensor parallelism must not cut; 0: none to cut, -1: a whole row
    cuda      its kernels need CUDA
    """

    id: str
    family: str
    format: str
    command: tuple[str, ...]
    weigh: Callable[[Geometry], Weights]
    group: int = 0
    cuda: bool = False


def rows() -> tuple[Row, ...]:
    """All of them: folders first, then GGUF by size as the table of mixes has them."""
    return (*_folder_rows(), *(_gguf_row(mix) for mix in MIXES.values() if mix.base not in ("F32", "F16")))


def find_rows(name: str | None) -> tuple[Row, ...]:
    """The rows of a --type: one by its name, a family by its first word (int4, fp8), all without. InputError else."""
    everything = rows()
    if name is None:
        return everything
    wanted = ALIASES.get(name.upper(), name).lower()
    found = [row for row in everything if row.id.lower() == wanted]
    found = found or [row for row in everything if wanted in (row.family, row.id.split("-")[0].lower())]
    if not found:
        ids = {row.id.lower(): row.id for row in everything}
        near = get_close_matches(wanted, ids, n=1)
        words = dict.fromkeys(row.id.split("-")[0] if row.family == FOLDER else row.family for row in everything)
        listed = f"expected one that `mmquant fit` lists, or {', '.join(words)}"
        said = f"did you mean {ids[near[0]]}?" if near else listed
        raise InputError(f"--type {name}: unknown, {said}")
    return tuple(found)


def _gguf_row(mix: Mix) -> Row:
    def weigh(g: Geometry) -> Weights:
        return mix_weights(g, mix, mix.base not in (*PLAIN, "Q8_0"))

    return Row(mix.name, GGUF, "gguf", ("gguf", "--type", mix.name), weigh)


def _folder_rows() -> Iterator[Row]:
    for storage in FORMATS:
        if not storage.command:
            continue
        if storage.requantizable:
            yield _fp8_row(storage)
            continue
        if storage.command == "mlx":
            for bits in sorted(storage.bits):
                for group in sorted(storage.group_sizes or (), reverse=True):
                    yield _mlx_row(storage, bits, group)
            continue
        for group in storage.group_sizes or sorted(GROUP_SIZES, reverse=True):
            for attention in _attentions(storage):
                yield _weights_row(storage, storage.bits[0], group, attention)


def _mlx_row(storage: Format, bits: int, group: int) -> Row:
    """Experts in a mode of MLX; attention, embeddings and head at eight bits, as its command writes them."""
    experts, several = Scheme(storage, bits, group, storage.symmetric[0]), len(storage.bits) > 1
    mode, eight, size = EIGHT_BIT
    row = choices("mlx")[mode]
    beside = Scheme(row, eight, size, row.symmetric[0])

    def weigh(g: Geometry) -> Weights:
        return folder_weights(g, experts, beside, tables=beside)

    words = ("--bits", str(bits), "--group-size", str(group)) if several else ("--mode", storage.choice)
    name = f"mlx-{bits}-g{group}" if several else f"mlx-{storage.choice}"
    return Row(name, MLX, storage.manifest, ("mlx", *words), weigh)


def _attentions(storage: Format) -> tuple[str, ...]:
    """How attention may lie beside its experts: as released, FP8 where formats mix, as the experts."""
    return ("bf16", *(ATTENTION_FP8 if storage.mixes else ()), "same")


def _fp8_row(storage: Format) -> Row:
    tiles = storage.tiled or storage.nearest is None  # the release as it is lies in tiles
    scheme = Scheme(storage, 8, block=TILE if tiles else None)

    def weigh(g: Geometry) -> Weights:
        return folder_weights(g, scheme, scheme, release=True)

    command = (storage.command, "--scheme", storage.choice)
    group = TILE[1] if tiles else 0
    return Row(f"{storage.command}-{storage.choice}", FOLDER, storage.manifest, command, weigh, group)


def _weights_row(storage: Format, bits: int, group: int, attention: str) -> Row:
    experts = Scheme(storage, bits, group, storage.symmetric[0])
    beside: Scheme | None = experts if attention == "same" else None
    if attention in ATTENTION_FP8:
        fp8 = choices("fp8")[ATTENTION_FP8[attention]]
        beside = Scheme(fp8, 8, block=TILE if fp8.tiled else None)

    def weigh(g: Geometry) -> Weights:
        return folder_weights(g, experts, beside, release=True)

    several, default = len(storage.group_sizes or GROUP_SIZES) > 1, next(iter(choices(storage.command)), "")
    name = [storage.command if storage.choice in ("", default) else storage.choice]
    if name[0] != storage.command and not several:  # a word that says no number of bits
        name.insert(0, storage.command)
    name += [f"g{group}"] * several
    word = storage.command if attention == "same" else attention
    name += [f"attention-{word}"] * (attention != "bf16")
    command = [storage.command, *(("--format", storage.choice) if storage.choice else ())]
    command += ["--group-size", str(group)] * several
    command += ["--attention", word] * (attention != "bf16")
    return Row("-".join(name), FOLDER, storage.manifest, tuple(command), weigh, group, cuda=True)
