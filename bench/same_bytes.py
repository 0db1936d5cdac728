"""Whether two checkouts write the same bytes: every kind of artifact of the demo model, compared file by file.

    python bench/same_bytes.py BEFORE AFTER [--only fp8-block gguf-Q4_K_M] [--model demo] [--keep FOLDER]

BEFORE and AFTER are checkouts (their .venv/bin/python is used where there is one) or Python executables that have
mmquant installed. The manifest is compared without its date, SHA256 sums included. Columns: the artifact, its files,
`equal` or, for each file that differs, where it does first. A kind that one side does not know counts as different, as
the others go on. Exit code 1 when anything differs. docs/lab.md says what differs from older commits, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MANIFEST, DATE = "mmquant.fit.json", "generated"
BLOCK = 1 << 20
RTN = ("int4", "--method", "rtn", "--group-size", "32")
CALIBRATED = ("--windows", "16", "--context", "128")
# Name -> what follows `mmquant`, without --model and --out.
ARTIFACTS: dict[str, tuple[str, ...]] = {
    "fp8-block": ("fp8", "--scheme", "block"),
    "fp8-channel": ("fp8", "--scheme", "channel"),
    "fp8-native": ("fp8", "--scheme", "native"),
    "bf16": ("bf16",),
    "int4-rtn": RTN,
    "int4-rtn-awq": (*RTN, "--format", "awq"),
    "int4-rtn-gptq": (*RTN, "--format", "gptq"),
    "int4-gptq": ("int4", "--group-size", "32", *CALIBRATED),
    "int4-awq": ("int4", "--method", "awq", "--format", "awq", "--group-size", "32", *CALIBRATED),
    "nvfp4-rtn": ("nvfp4", "--method", "rtn"),
    "nvfp4": ("nvfp4", "--attention", "nvfp4", "--activations", "nvfp4", *CALIBRATED),
    "mxfp4": ("mxfp4", *CALIBRATED),
    "gguf-Q8_0": ("gguf", "--type", "Q8_0"),
    "gguf-Q4_K_M": ("gguf", "--type", "Q4_K_M", *CALIBRATED),
    "gguf-Q4_K_M-fast": ("gguf", "--type", "Q4_K_M", "--effort", "fast", *CALIBRATED),
    "gguf-IQ2_XXS": ("gguf", "--type", "IQ2_XXS", "--no-calibration"),
}


@dataclass(frozen=True)
class Side:
    """One of the two: its Python and the environment that makes it import its own mmquant."""

    python: str
    environment: dict[str, str]

    def write(self, arguments: tuple[str, ...], model: str, out: Path) -> str | None:
        """Run one command; the last line of stderr when it failed."""
        line = [self.python, "-m", "mmquant", *arguments, "--model", model, "--device", "cpu", "--out", str(out)]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, cwd=out.parent)
        return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def side(place: str) -> Side:
    """A checkout or a Python executable."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    path = Path(place).absolute()
    if path.is_file():
        return Side(str(path), environment)
    if not (path / "pyproject.toml").is_file():
        sys.exit(f"{place}: expected a checkout of mmquant or a Python executable")
    own = path / ".venv" / "bin" / "python"
    # The checkout comes first on the path: an environment that both share would otherwise give one of them twice.
    environment["PYTHONPATH"] = str(path)
    found = Side(str(own if own.exists() else sys.executable), environment)
    probe = [found.python, "-c", "import mmquant; print(mmquant.__file__)"]
    where = subprocess.run(probe, env=environment, capture_output=True, text=True, cwd=path.parent).stdout.strip()
    if not where or not Path(where).resolve().is_relative_to(path.resolve()):
        sys.exit(f"{place}: its Python imports {where or 'no mmquant'}, expected the checkout's own")
    return found


def compare(before: Path, after: Path) -> tuple[int, list[str]]:
    """Number of files of two folders, and one line per file that differs."""
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (before, after)]
    lines = []
    for name in sorted(names[0] | names[1]):
        if not (name in names[0] and name in names[1]):
            lines.append(f"{name} is in the {'first' if name in names[0] else 'second'} alone")
        elif (found := difference(before / name, after / name)) is not None:
            lines.append(f"{name}: {found}")
    return len(names[0]), lines


def difference(before: Path, after: Path) -> str | None:
    """The first difference of two files in words, None when they are equal."""
    if before.name == MANIFEST:
        one, two = (json.loads(path.read_text("utf-8")) | {DATE: None} for path in (before, after))
        return first_key(one, two, "")
    sizes = before.stat().st_size, after.stat().st_size
    with open(before, "rb") as one, open(after, "rb") as two:
        at = 0
        while block := one.read(BLOCK):
            other = two.read(BLOCK)
            if block != other:
                byte = next((i for i, (a, b) in enumerate(zip(block, other, strict=False)) if a != b), len(other))
                return f"byte {at + byte:,} of {sizes[0]:,}"
            at += len(block)
    return None if sizes[0] == sizes[1] else f"{sizes[0]:,} bytes, then {sizes[1]:,}"


def first_key(one: object, two: object, where: str) -> str | None:
    """The first place in which two JSON documents differ, and both values."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            if key not in one or key not in two:
                return f"{where}{key} is in the {'first' if key in one else 'second'} alone"
            if (found := first_key(one[key], two[key], f"{where}{key}.")) is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = (first_key(a, b, f"{where}{i}.") for i, (a, b) in enumerate(zip(one, two, strict=True)))
        return next((found for found in pairs if found is not None), None)
    return None if one == two else f"{where.rstrip('.')} {str(one)[:40]!r}, then {str(two)[:40]!r}"


def main() -> int:
    """Write and compare everything; 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs=2, metavar="CHECKOUT")
    parser.add_argument("--only", nargs="+", choices=list(ARTIFACTS), default=list(ARTIFACTS))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--keep", type=Path, help="write here and leave it; default: a temporary folder")
    a = parser.parse_args()
    both, different = [side(place) for place in a.sides], 0
    print(f"{'artifact':<18}{'files':>6}  result")
    with tempfile.TemporaryDirectory() as temporary:
        base = (a.keep or Path(temporary)).absolute()
        for name in a.only:
            folders = [base / which / name for which in ("before", "after")]
            count, lines = artifact(name, both, folders, a.model)
            different += bool(lines)
            first, *others = lines or ["equal"]
            print(f"{name:<18}{count:>6}  {first}", *(f"{'':<26}{line}" for line in others), sep="\n", flush=True)
    return int(different > 0)


def artifact(name: str, both: list[Side], folders: list[Path], model: str) -> tuple[int, list[str]]:
    """Write one kind by both sides and compare; a side that cannot write it is a difference of its own."""
    faults = []
    for which, one, folder in zip(("first", "second"), both, folders, strict=True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (fault := one.write(ARTIFACTS[name], model, folder)) is not None:
            faults.append(f"the {which} does not write it: {fault}")
    return (0, faults) if faults else compare(*folders)


if __name__ == "__main__":
    sys.exit(main())
