"""Rehearse at MiniMax-M2.7's full size without its weights.

    python -m bench.rehearsal serve [--layers 3]          # prints the environment; ends with its stdin
    python -m bench.rehearsal run [--layers 3] -- mmquant fp8 --model MODEL --out OUT ...
    python -m bench.rehearsal speed                       # the server's rate, apart from any client
    python -m bench.rehearsal imatrix --layers 3 imatrix.gguf
    python -m bench.rehearsal whole DIR                   # all layers to FP8, compared, output discarded; continues
    python -m bench.rehearsal digests                     # once: SHA-256 of 230 GB, ten minutes of a core

`run` puts the repository's name in place of MODEL, and reports time, peak resident memory and peak disk of OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import imatrix
from .measure import measured
from .model import LAYERS, Model
from .serve import serve, speed
from .shard import KNOWN, Digests, Shard
from .whole import product, whole


def compute_digests(options: argparse.Namespace) -> None:
    """Fill the file of digests; those that are in it are left alone."""
    digests = Digests(options.digests)
    for number, layout in enumerate(Model(options.layers).layouts, 1):
        print(number, layout.name, digests.of(Shard(layout, options.seed)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (
        ("serve", serve),
        ("run", measured),
        ("digests", compute_digests),
        ("speed", speed),
        ("whole", whole),
        ("product", product),
        ("imatrix", imatrix.write),
    ):
        one = commands.add_parser(name)
        one.set_defaults(function=function)
        one.add_argument("--layers", type=int, default=LAYERS, help="Serve a model of the first layers alone.")
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--digests", type=Path, default=KNOWN, help="Where further digests are kept.")
        if name == "imatrix":
            one.add_argument("file", type=Path)
        if name in ("whole", "product"):
            one.add_argument("folder", type=Path)
        if name in ("run", "product"):
            one.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
