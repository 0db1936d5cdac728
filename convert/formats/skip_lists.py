"""Match skip lists (modules_to_not_convert, ignored_layers, ignore, dynamic) as each engine does.

Engines look matrices up under names of their own and match lists by rules of their own, per quantization method:
vLLM      fp8: whole names, for experts any entry that contains its own name of them; AWQ: an entry inside the name
SGLang    fp8: an entry that is a run of whole parts of the name; AWQ: an entry inside the name
transformers  an entry (a pattern) that begins the name, or that ends it
AutoRound  module names, or patterns found in them, under the release's and transformers' names
mlx_lm    module names alone; an architecture's experts of a layer are one module a projection
compressed-tensors (`ignore`, `targets`): whole names, or patterns after `re:` from the start, in all of them.
Source: vLLM quant_utils.py (is_layer_skipped), compressed_tensors/utils.py; SGLang quantization/utils.py
(_module_path_match), awq.py; transformers quantizers_utils.py (should_convert_module).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from mmquant.errors import InputError

from ..files.parse import are, is_list, short
from ..models.names import TensorNames
from .patterns import compiled

VLLM, SGLANG, TRANSFORMERS, MLX, AUTO_ROUND = "vLLM", "SGLang", "transformers", "mlx_lm", "AutoRound"
EXLLAMAV3 = "exllamav3"
ENGINES = (VLLM, SGLANG, TRANSFORMERS)
_FUSED = re.compile(r"\.[qkv]_proj$")

Skips = Callable[[Sequence[str], Sequence[str]], bool]  # entries, the engine's names of a matrix


def names_of(names: TensorNames, name: str, engine: str, single: bool = False, fused: bool = False) -> tuple[str, ...]:
    """What an engine calls a matrix (release name without .weight) when it looks up how that is stored.

    single  one lookup a projection of a layer's experts (compressed-tensors), else one for all of them
    fused   q, k and v are looked up as qkv_proj
    """
    found = names.expert_of(name)
    if engine == AUTO_ROUND:
        return _all_names(names, name)
    if engine == MLX:
        return (name if found is None else names.stack(found.layer, found.projection),)
    if found is None:
        return (_FUSED.sub(".qkv_proj", name),) if fused and engine != TRANSFORMERS else (name,)
    last, vllm = names.projections[found.projection], f"{found.stem}.{names.vllm_moe}.experts"
    if engine == VLLM:
        return (f"{vllm}.0.{last}" if single else vllm,)
    if engine == SGLANG:
        stem = f"{found.stem}.{names.moe}.experts"
        return (f"{stem}.0.{names.sglang[found.projection]}" if single else stem,)
    return (name, f"{vllm}.{found.number}.{last}", vllm)


def _all_names(names: TensorNames, name: str) -> tuple[str, ...]:
    """The names of a module in the release, in transformers, and with either's names for parts of an expert."""
    found = names.expert_of(name)
    both = [name]
    if found is not None:
        both.append(f"{found.stem}.{names.moe}.experts.{found.number}.{names.sglang[found.projection]}")
    return tuple(dict.fromkeys([*both, *(one.replace(f".{names.moe}.", f".{names.vllm_moe}.") for one in both)]))


def whole_names(entries: Sequence[str], names: Sequence[str]) -> bool:
    """vLLM, fp8."""
    return any(
        name in entries or (".experts" in name and any(name in entry for entry in entries if "experts" in entry))
        for name in names
    )


def whole_parts(entries: Sequence[str], names: Sequence[str]) -> bool:
    """SGLang, fp8."""
    expected = [f".{entry.rstrip('.')}." for entry in entries if entry.rstrip(".")]
    return any(entry in f".{name}." for name in names for entry in expected)


def inside_the_name(entries: Sequence[str], names: Sequence[str]) -> bool:
    """vLLM and SGLang, AWQ."""
    return any(entry in name for name in names for entry in entries if entry)


def start_or_end(entries: Sequence[str], names: Sequence[str]) -> bool:
    """transformers, every method with modules_to_not_convert."""
    return any(name.endswith(entry) or _begins(entry, name) for name in names for entry in entries if entry)


def _begins(pattern: str, name: str) -> bool:
    try:
        return compiled(pattern).match(name)
    except re.error:  # no pattern: the engine would fail, so nothing is skipped by it
        return False


FP8_RULES: dict[str, Skips] = {VLLM: whole_names, SGLANG: whole_parts, TRANSFORMERS: start_or_end}
AWQ_RULES: dict[str, Skips] = {VLLM: inside_the_name, SGLANG: inside_the_name, TRANSFORMERS: start_or_end}


def matches(target: str, names: Iterable[str]) -> bool:
    """Whether a compressed-tensors target (a name, or a pattern after `re:`) is one of the names."""
    return matches_pattern(target[3:], names) if target.startswith("re:") else target in names


def matches_pattern(pattern: str, names: Iterable[str]) -> bool:
    """Whether a regular expression of config.json begins one of the names; InputError when it is none."""
    try:
        return any(compiled(pattern).match(name) for name in names)
    except re.error as error:
        raise InputError(f"config.json: {short(pattern)} is not a regular expression ({error})") from None


def strings(value: object, where: str) -> list[str]:
    """A list of texts of config.json, InputError for anything else; null is an empty one."""
    if value is None:
        return []
    if not is_list(value) or not are(value, str):
        raise InputError(f"config.json: {where} is {short(value)}, expected a list of names")
    return value
