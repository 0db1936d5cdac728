"""The bytes of an answer as they arrive, with stalls found out; and small ranges of a file, in memory."""

from __future__ import annotations

import array
import fcntl
import termios
import time
from collections.abc import Iterator

import requests

from .http import NETWORK_ERRORS, Client, TransferError, explain, reason

PIECE = 1 << 20
RECORD = 17 << 10  # more than a TLS record
REST = 0.01  # seconds in which bytes gather: each read takes the interpreter from the thread that works on a layer
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
            piece = _read(response, min(PIECE, left), rest=length > PIECE and left < length)
            if not piece:
                raise BrokenBodyError(f"the body ends {left} bytes early")
            left, window = left - len(piece), window + len(piece)
            yield piece
            if time.monotonic() - since > client.retry.stall:
                if window < LEAST_PROGRESS and left:
                    raise BrokenBodyError(f"{window} bytes in {client.retry.stall:.0f} s: stalled")
                window, since = 0, time.monotonic()
    finally:
        response.close()


def _read(response: requests.Response, most: int, rest: bool) -> bytes:
    """What has arrived, up to `most` bytes and at least one; waits for no more than the first.

    A single read over TLS gives one record of at most 16 KiB, so records that are certainly whole are read together.
    """
    arrived = _arrived(response)
    if rest and not arrived:
        time.sleep(REST)
        arrived = _arrived(response)
    whole = arrived - arrived // 32 - RECORD
    return response.raw.read(min(whole, most)) if whole > RECORD else response.raw.read1(most)


def _arrived(response: requests.Response) -> int:
    """Bytes in the system's buffer, encrypted ones as they are."""
    if response.raw.closed:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(response.raw.fileno(), termios.FIONREAD, count)
    return count[0]


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
