"""Paths of the checkout, of the package under test and of the tests' data."""

from pathlib import Path

import mmquant

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
PACKAGE = Path(mmquant.__file__).resolve().parent
# Where commands/, runs/ and so on lie: beside the package in a checkout, in it when it is installed.
SOURCE = ROOT if PACKAGE.parent == ROOT else PACKAGE
