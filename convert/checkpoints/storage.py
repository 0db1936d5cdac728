"""Tell how matrices are stored from their tensors, and report where config.json disagrees."""

from __future__ import annotations

from collections.abc import Mapping

from mmquant.errors import InputError

from ..files.parse import short
from ..formats.format import Scheme
from ..formats.fp8_native import SCALES
from ..formats.plain import PLAIN
from ..formats.skip_lists import SGLANG, VLLM
from .quantization_config import SchemeBook
from .store import TensorInfo

Parts = Mapping[str, TensorInfo]  # the tensors of one module, by the last part of their names


def is_plain(parts: Parts) -> bool:
    """Whether a matrix is there as plain floating-point values."""
    return "weight" in parts and parts["weight"].dtype in PLAIN


def form(parts: Parts) -> str:
    """How a matrix is stored, in words."""
    scale = next((suffix for suffix in SCALES if suffix in parts), None)
    if "weight" in parts:
        dtype = parts["weight"].dtype
        if "scales" in parts:
            return f"MLX words ({', '.join(sorted(parts))})"
        return ("FP8" if dtype.startswith("F8") else dtype) + (f" with {scale}" if scale else "")
    if "weight_packed" in parts:
        return "packed words (weight_packed)"
    return "AWQ or GPTQ words (qweight)" if "qweight" in parts else ", ".join(sorted(parts)) or "nothing"


def scheme_for(book: SchemeBook | None, name: str, parts: Parts) -> Scheme | None:
    """The scheme of a matrix: of the first engine whose reading fits how it is stored, else vLLM's."""
    if book is None:
        return None
    plain = is_plain(parts)
    if plain and book.derives(name):
        return None
    for _, scheme in book.readings(name):
        if (scheme is None) == plain:
            return scheme
    return book.reading(name, book.engines[0])


def words(scheme: Scheme | None) -> str:
    """A scheme, as messages name it."""
    if scheme is None:
        return "unquantized"
    if scheme.block is not None:
        return f"{scheme.format.name} of {scheme.bits} bits, tiles {scheme.block[0]}x{scheme.block[1]}"
    return f"{scheme.format.name} of {scheme.bits} bits, group {scheme.group}"


def check_storage(label: str, book: SchemeBook | None, found: Mapping[str, tuple[Parts, Scheme | None]]) -> None:
    """InputError when matrices are stored otherwise than config.json says.

    Its quantization_config was left behind or lost, or its skip list names others. `found`: of every matrix its tensors
    and its scheme.
    """
    there = {name: entry for name, entry in found.items() if entry[0]}
    wrong = [name for name, (parts, scheme) in there.items() if is_plain(parts) != (scheme is None)]
    if not wrong:
        return
    first, (parts, scheme) = wrong[0], there[wrong[0]]
    stored, count = form(parts), f"{len(wrong)} of {len(there)} matrices, first {first}"
    if book is None:
        raise InputError(
            f"{label}: {count}, are stored as {stored}, but config.json has no quantization_config: it was lost; "
            "copy it from the original's config.json"
        )
    if all(is_plain(parts) for parts, _ in there.values()):
        raise InputError(
            f"{label}: config.json has a quantization_config ({book.method}), but every matrix is plain {stored}: it "
            "was left behind when the weights were dequantized; remove quantization_config from config.json"
        )
    says = "leaves it unquantized" if scheme is None else f"calls for {words(scheme)}"
    raise InputError(f"{label}: {first} is stored as {stored}, quantization_config in config.json {says} ({count})")


def engine_notes(label: str, book: SchemeBook | None, found: Mapping[str, tuple[Parts, Scheme | None]]) -> list[str]:
    """A line for each engine that would read a matrix otherwise than it is stored."""
    if book is None:
        return []
    notes: list[str] = []
    for engine in (engine for engine in (VLLM, SGLANG) if engine in book.engines):
        names = [
            name
            for name, (_, scheme) in found.items()
            if (book.reading(name, engine) is None) != (scheme is None) and not (engine == VLLM and book.derives(name))
        ]
        if names:
            here = words(found[names[0]][1])
            notes.append(
                f"{label}: {engine} matches the skip list in quantization_config otherwise: {len(names)} matrices, "
                f"first {names[0]} (stored {here})"
            )
    return notes


def modules_of(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Module name -> last part of the name -> tensor."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = info
    return modules


def check_method(book: SchemeBook | None) -> None:
    """InputError for a quant_method that stores integers only: that is no source."""
    if book is not None and book.integers:
        said = f"quant_method is {short(book.method)}, expected fp8, compressed-tensors' FP8 or no quantization_config"
        raise InputError(f"config.json: {said}: quantize the original instead")


def no_source(label: str, scheme: Scheme) -> InputError:
    """What is stored in integers is not quantized again."""
    return InputError(f"{label}: {words(scheme)}, expected a source in FP8 or BF16: quantize the original instead")
