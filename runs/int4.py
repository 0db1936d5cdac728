"""Check the options of `mmquant int4` and write the folder."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError
from mmquant.monitor import current

from ..calibration.int4.layer import Int4Options
from ..calibration.int4.variant import CalibratedInt4
from ..calibration.statistics.live import moment_plan
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.int4 import ATTENTION_FP8, Int4Variant, check_groups
from ..convert.formats.table import choices
from ..convert.requires import notes
from ..quantize.integer.gptq import Grid
from .calibrate import NAMES, make_provider, pass_of, tokens_at_most
from .folder import check_place, write_folder

STREAMS = ".mmquant-streams"  # what a killed run of high effort continues from


@dataclass(frozen=True)
class Int4Request:
    """The options of one run; `calibration`: those of options_calibration."""

    method: str
    layout: str
    group_size: int
    attention: str
    effort: str
    symmetric: bool
    tp: int
    device: str
    calibration: dict[str, Any]
    eight_bit: tuple[int, ...] = ()
    kv_cache: str = "bf16"

    @classmethod
    def from_options(cls, options: dict[str, Any], device: str) -> Int4Request:
        """Check what contradicts itself (InputError)."""
        layout = options["layout"]
        asymmetric = not symmetric_of(options)
        check_mixture(options)
        if options["effort"] == "high" and options["method"] == "rtn":
            raise InputError("--effort high --method rtn: rounding to nearest is not refined, expected gptq or awq")
        if options["effort"] == "high" and options["method"] == "gptq" and asymmetric:
            raise InputError("--effort high: learned rounding is for symmetric grids, leave --asymmetric out")
        if options["method"] == "rtn" and options["statistics"] is not None:
            raise InputError("--method rtn --statistics: round to nearest uses no statistics")
        if options["kv_cache"] == "fp8" and options["method"] == "rtn":
            raise InputError("--kv-cache fp8 --method rtn: the scales are calibrated, expected gptq or awq")
        return cls(
            options["method"],
            layout,
            int(options["group_size"]),
            options["attention"],
            options["effort"],
            not asymmetric,
            options["tp"],
            device,
            {name: options[name] for name in NAMES},
            layers_of(options["eight_bit"]),
            options["kv_cache"],
        )

    def variant(self, source: Checkpoint, out: Path) -> Int4Variant:
        """The artifact to write. ValueError when its groups do not fit the model at the tensor parallelism."""
        check_groups(source.geometry, self.group_size, self.tp, self.attention)
        for note in notes({"command": "int4", "group_size": self.group_size}, source.geometry):
            current().message(note)
        shape = {"group_size": self.group_size, "attention": self.attention, "layout": self.layout}
        shape |= {"eight_bit": self.eight_bit, "kv_cache": self.kv_cache}
        if self.method == "rtn":
            return Int4Variant(**shape, symmetric=self.symmetric)
        options = Int4Options(
            method=self.method,
            effort=self.effort,
            grid=Grid(4, self.group_size, self.symmetric),
            attention=self.attention,
            seed=self.calibration["seed"],
        )
        folder = out / STREAMS if options.learned else None
        return CalibratedInt4(
            **shape, symmetric=self.symmetric, options=options, report=current().message, streams=folder
        )


def symmetric_of(options: dict[str, Any]) -> bool:
    """Whether the grid has no zero points: the format's habit unless asked otherwise. InputError if it has no such."""
    layout, row = options["layout"], choices("int4")[options["layout"]]
    if options["asymmetric"] and False not in row.symmetric:
        other = " or ".join(word for word, row in choices("int4").items() if False in row.symmetric)
        raise InputError(f"--format {layout} --asymmetric: engines read symmetric {layout} only; use --format {other}")
    return row.symmetric[0] and not options["asymmetric"]


def check_mixture(options: dict[str, Any]) -> None:
    """InputError for FP8 attention or an FP8 cache beside integers of a format that holds nothing beside them."""
    if choices("int4")[options["layout"]].mixes:
        return
    mixing = " or ".join(word for word, row in choices("int4").items() if row.mixes)
    if options["attention"] in ATTENTION_FP8:
        said = f"--format {options['layout']} --attention {options['attention']}"
        raise InputError(f"{said}: only {mixing} holds FP8 beside INT4")
    if options["kv_cache"] == "fp8":
        raise InputError(f"--kv-cache fp8 --format {options['layout']}: expected {mixing}")


def layers_of(text: str | None) -> tuple[int, ...]:
    """0,60-61 -> (0, 60, 61). InputError for anything else, and for layers that no model has."""
    found: set[int] = set()
    for part in (text or "").split(",") if text else []:
        first, _, last = part.partition("-")
        if not all(re.fullmatch("[0-9]{1,4}", end.strip()) for end in (first, last or first)):
            raise InputError(f"--eight-bit {text!r}, expected layers such as 0,60-61")
        if int(last or first) < int(first):
            raise InputError(f"--eight-bit {text!r}: {part} runs backwards, expected layers such as 0,60-61")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def check_int4(source: Checkpoint, variant: Int4Variant, request: Int4Request, out: Path, size: int) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, {**variant.run(), "source": source.fingerprint})
    if isinstance(variant, CalibratedInt4) and request.calibration["statistics"] is None:
        chosen = pass_of(request.calibration, request.device, variant.options.learned, variant.options.full)
        moment_plan(source, chosen, tokens_at_most(source, request.calibration))


def write_int4(source: Checkpoint, variant: Int4Variant, request: Int4Request, out: Path, limit: int) -> Path:
    """Write the folder; what a killed run would have continued from goes with it."""
    provider = None
    if isinstance(variant, CalibratedInt4):
        provider = make_provider(
            source,
            request.calibration,
            request.device,
            out / STREAMS,
            hidden=variant.options.learned,
            full=variant.options.full,
        )
    if isinstance(variant, CalibratedInt4) and variant.options.learned:
        source.schedule.behind = 1  # the reference stream reads the layer before once more
    done = write_folder(source, variant, out, device=request.device, limit=limit, provider=provider)
    shutil.rmtree(out / STREAMS, ignore_errors=True)
    return done
