"""Read the body of an HTTP answer, detect stalls, and fetch small ranges into memory."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator

import requests

from .http import NETWORK_ERRORS, Client, TransferError, explain, reason

PIECE = 1 << 20
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
            piece = _read(response, min(PIECE, left), gather=length > PIECE)
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


def _read(response: requests.Response, most: int, gather: bool) -> bytes:
    """What has arrived, up to `most` bytes and at least one; waits for no more than the first.

    A single read over TLS gives one record of at most 16 KiB, so records that lie in the system's buffer are read
    together, and with `gather` those that come within REST seconds.
    """
    pieces = [response.raw.read1(most)]
    size = len(pieces[0])
    if not size or not gather or size == most:
        return pieces[0]
    with selectors.DefaultSelector() as waiting:
        if not _register(waiting, response):
            return pieces[0]
        rested = False
        while size < most:
            if not waiting.select(0):
                if rested:
                    break
                time.sleep(REST)
                rested = True
                continue
            try:
                piece = response.raw.read1(most - size)
            except NETWORK_ERRORS:
                break  # what has arrived counts; the next read fails as well
            pieces.append(piece)
            size += len(piece)
            if not piece or response.raw.closed:
                break
    return b"".join(pieces)


def _register(waiting: selectors.BaseSelector, response: requests.Response) -> bool:
    """Watch the connection of a response for bytes; False when it is closed already."""
    if response.raw.closed:
        return False
    try:
        waiting.register(response.raw.fileno(), selectors.EVENT_READ)
    except (OSError, ValueError, KeyError):  # closed once the last byte was read
        return False
    return True


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
