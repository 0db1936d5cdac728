"""Parse sizes as users write them."""

from __future__ import annotations

import re
from decimal import Decimal

from mmquant.errors import InputError

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE = re.compile(r"(\d+(?:\.\d*)?(?:e\d{1,2})?) *(?:([kmgt]?)(i?)b?)", re.ASCII | re.IGNORECASE)
LARGEST = 2**63 - 1


def parse_size(text: str) -> int:
    """98GB, 98GiB, 98e9 or plain bytes -> bytes; powers of 1000 for GB (and G), of 1024 for GiB (and Gi).

    Raises InputError for anything else, for less than a byte and for more than a file system can hold.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{text!r}, expected a size such as 5GB, 512MiB or 5e9")
    size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].upper()])
    if not 1 <= size <= LARGEST:
        raise InputError(f"{text!r}, expected 1 to {LARGEST:,} bytes")
    return size
