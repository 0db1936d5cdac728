"""Parse RoPE from config.json: theta, rotary dimensions, context scaling (YaRN, linear).

Both spellings are read: `rope_parameters` (transformers 5, with theta and partial_rotary_factor inside) and
`rope_scaling` beside top-level keys. Source of the formulas: transformers modeling_rope_utils.py; ggml ops.cpp
(rope_yarn) computes the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from ..files.parse import is_object

YARN, LINEAR, DEFAULT = "yarn", "linear", "default"
BETA_FAST, BETA_SLOW = 32.0, 1.0
MOST_CONTEXT = 1 << 40


@dataclass(frozen=True)
class RopeScaling:
    """What stretches the context.

    `original_context` tokens were trained on; `attention_factor` multiplies cos and sin; between `beta_fast` and
    `beta_slow` rotations over the original context a dimension is partly interpolated.
    """

    kind: str
    factor: float
    original_context: int
    attention_factor: float = 1.0
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW

    @property
    def usual_attention_factor(self) -> float:
        """What YaRN multiplies cos and sin by when nothing else is said."""
        return usual_attention_factor(self.factor) if self.kind == YARN else 1.0

    def parameters(self) -> dict[str, Any]:
        """Keys of `rope_parameters` that say the same; those with usual values are left out."""
        found: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == LINEAR:
            return found
        found["original_max_position_embeddings"] = self.original_context
        if not math.isclose(self.attention_factor, self.usual_attention_factor, rel_tol=1e-6):
            found["attention_factor"] = self.attention_factor
        if (self.beta_fast, self.beta_slow) != (BETA_FAST, BETA_SLOW):
            found |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        return found


@dataclass(frozen=True)
class Rope:
    """theta, the dimensions of a head that turn, and the scaling (None: none)."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None


def stretched(scaling: RopeScaling | None) -> int:
    """Tokens of context that YaRN makes of the original ones; 0 without it."""
    return int(scaling.original_context * scaling.factor) if scaling is not None and scaling.kind == YARN else 0


def same_scaling(one: RopeScaling | None, other: RopeScaling | None) -> bool:
    """Whether two say the same, numbers up to float32 (GGUF stores those)."""
    if one is None or other is None:
        return one is other
    if one.kind != other.kind or (one.kind == YARN and one.original_context != other.original_context):
        return False
    numbers = ("factor", "attention_factor", "beta_fast", "beta_slow")
    return all(math.isclose(getattr(one, name), getattr(other, name), rel_tol=1e-6) for name in numbers)


def usual_attention_factor(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by for a factor of context."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(config: dict[str, Any], head_dim: int, max_context: int) -> Rope:
    """RoPE of a config.json. InputError for what is missing, malformed, contradictory or not computed here."""
    new, old = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    places = (("config.json", config), new, old)
    theta = _first(places, "rope_theta", least=1.0)
    if theta is None:
        raise InputError("config.json: rope_theta is missing")
    found = [_scaling(part, where, max_context) for where, part in (new, old) if _says(part)]
    if len(found) == 2 and found[0] != found[1]:
        said = " and ".join(f"{where} {part!r}" for where, part in (new, old))
        raise InputError(f"config.json: {said} contradict each other, expected one of them")
    return Rope(theta, _rotary_dim(config, places, head_dim), found[0] if found else None)


Part = tuple[str, dict[str, Any]]  # where it stands, its keys


def _object(config: dict[str, Any], key: str) -> Part:
    """A RoPE object of config.json; one written for each layer type is taken when all layers have the same."""
    value = config.get(key)
    where = f"config.json: {key}"
    if value is None:
        return where, {}
    if not is_object(value):
        raise InputError(f"{where} is {value!r}, expected an object")
    parts = [part for part in value.values() if is_object(part)]
    if value and len(parts) == len(value):
        if any(part != parts[0] for part in parts):
            raise InputError(f"{where} differs between layer types ({', '.join(value)}), MiniMax-M2 has one for all")
        return where, parts[0]
    return where, value


def _says(part: dict[str, Any]) -> bool:
    """Whether an object says anything of scaling."""
    return any(key in part for key in ("rope_type", "type", "factor"))


def _first(places: tuple[Part, ...], key: str, least: float = 0.0) -> float | None:
    """The number under `key` in the first place that has one."""
    return next((_number(part, key, None, where, least) for where, part in places if part.get(key) is not None), None)


def _rotary_dim(config: dict[str, Any], places: tuple[Part, ...], head_dim: int) -> int:
    size = config.get("rotary_dim")
    if size is None:
        share = _first(places, "partial_rotary_factor")
        size = head_dim if share is None else int(head_dim * share)
    if not isinstance(size, int) or isinstance(size, bool) or size > head_dim or size % 2 or size <= 0:
        raise InputError(f"config.json: rotary_dim {size!r}, expected even and at most {head_dim}")
    return size


def _number(part: dict[str, Any], key: str, default: float | None, where: str, least: float = 0.0) -> float | None:
    """A finite number above `least`."""
    value = part.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < float("inf"):
        raise InputError(f"{where}: {key} is {value!r}, expected a number above {least:g}")
    return float(value)


def _scaling(part: dict[str, Any], where: str, max_context: int) -> RopeScaling | None:
    """The scaling that an object asks for; None for none. InputError for the types that are not computed."""
    kind = part.get("rope_type", part.get("type", DEFAULT))
    if kind in (DEFAULT, "none", None):
        return None
    if kind not in (YARN, LINEAR):
        raise InputError(f"{where}: rope_type is {kind!r}, expected {DEFAULT}, {LINEAR} or {YARN}")
    original = part.get("original_max_position_embeddings") or max_context
    if not isinstance(original, int) or isinstance(original, bool) or not 0 < original < MOST_CONTEXT:
        raise InputError(f"{where}: original_max_position_embeddings is {original!r}, expected a positive integer")
    factor = _number(part, "factor", max_context / original if kind == YARN else None, where)
    if factor is None or factor < 1:
        raise InputError(f"{where}: factor is {part.get('factor')!r}, expected a number of at least 1")
    if factor == 1:
        return None
    return RopeScaling(LINEAR, factor, max_context) if kind == LINEAR else _yarn(part, where, factor, original)


def _yarn(part: dict[str, Any], where: str, factor: float, original: int) -> RopeScaling:
    if part.get("truncate") is False:
        raise InputError(f"{where}: truncate is False, expected YaRN with whole dimensions (true, or nothing)")
    fast, slow = _number(part, "beta_fast", BETA_FAST, where), _number(part, "beta_slow", BETA_SLOW, where)
    assert fast is not None
    assert slow is not None
    if fast <= slow:
        raise InputError(f"{where}: beta_fast {fast:g} is not above beta_slow {slow:g}")
    return RopeScaling(YARN, factor, original, _attention_factor(part, where, factor), fast, slow)


def _attention_factor(part: dict[str, Any], where: str, factor: float) -> float:
    given = _number(part, "attention_factor", None, where)
    if given is None:
        given = _number(part, "attn_factor", None, where)
    if given is not None:
        return given
    scale, overall = (_number(part, key, None, where) for key in ("mscale", "mscale_all_dim"))
    if scale and overall:
        return usual_attention_factor(factor, scale) / usual_attention_factor(factor, overall)
    return usual_attention_factor(factor)


def frequencies(theta: float, rotary_dim: int, scaling: RopeScaling | None) -> list[float]:
    """Radians a position of each pair of dimensions, [rotary_dim / 2]."""
    plain = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if scaling is None:
        return plain
    if scaling.kind == LINEAR:
        return [value / scaling.factor for value in plain]

    def dimension(turns: float) -> float:
        """The pair of dimensions that makes so many turns over the original context."""
        return rotary_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), rotary_dim - 1)
    width = max(high - low, 0.001)
    kept = [1 - min(max((i - low) / width, 0.0), 1.0) for i in range(rotary_dim // 2)]
    return [value * share + value / scaling.factor * (1 - share) for value, share in zip(plain, kept, strict=True)]
