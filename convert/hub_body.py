"""The bytes of an answer as they arrive, with stalls found out; and small ranges of a file, in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import requests

from .hub_http import NETWORK_ERRORS, Client, TransferError, explain, reason

PIECE = 1 << 20
GATHER = 256 << 10  # a piece below this is followed by a short rest, in which more arrives
REST = 0.01  # seconds; each read takes the interpreter from the thread that works on the last shard
LEAST_PROGRESS = 4 << 10  # bytes within one stall time; fewer is a stall


class BrokenBodyError(OSError):
    """The body ended before its length; what arrived counts."""


def body(client: Client, response: requests.Response, length: int) -> Iterator[bytes]:
    """The body's bytes as they arrive, `length` of them; BrokenBodyError when it ends early or stalls."""
    left, window, since = length, 0, time.monotonic()
    try:
        while left:
            if client.cancelled.is_set():
                raise TransferError("cancelled")
            piece = response.raw.read1(min(PIECE, left))
            if not piece:
                raise BrokenBodyError(f"the body ends {left} bytes early")
            left, window = left - len(piece), window + len(piece)
            yield piece
            if left and len(piece) < GATHER < length:
                time.sleep(REST)
            if time.monotonic() - since > client.retry.stall:
                if window < LEAST_PROGRESS and left:
                    raise BrokenBodyError(f"{window} bytes in {client.retry.stall:.0f} s: stalled")
                window, since = 0, time.monotonic()
    finally:
        response.close()


def fetch_range(client: Client, url: str, first: int, size: int, total: int, what: str) -> bytes:
    """`size` bytes at `first` of a file of `total` bytes, in memory. Raises as `fetch` does.

    From a server that ignores Range the beginning of the file is still read, and no more than that.
    """
    if size == 0:
        return b""
    expected, trouble = f"bytes {first}-{first + size - 1}/{total}", ""
    for attempt in range(client.retry.attempts + 1):
        response = client.send("GET", url, {"Range": expected.replace(" ", "=").split("/")[0]}, what=what)
        if response.status_code not in (200, 206):
            raise explain(response, client.endpoint, what)
        found = response.headers.get("Content-Range", "").strip()
        if (response.status_code == 206 and found != expected) or (response.status_code == 200 and first):
            response.close()
            raise TransferError(f"{what}: asked for {expected!r}, the server sends {found or 'the whole file'}")
        try:
            return b"".join(body(client, response, size))
        except (*NETWORK_ERRORS, BrokenBodyError) as error:
            trouble = reason(error)
        if attempt < client.retry.attempts:
            client.pause(attempt)
    raise TransferError(f"{what}: {trouble}, {client.retry.attempts + 1} attempts; run the command again to continue")
