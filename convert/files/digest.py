"""SHA-256 of a file that is being written, on a thread beside the writing."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

from mmquant.stages import behind, stage


class SideDigest:
    """SHA-256 of pieces in order; each is hashed while the next one is on its way."""

    def __init__(self) -> None:
        self._digest, self._pool = hashlib.sha256(), ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._last: Future[None] | None = None

    def begin(self) -> None:
        """A new file."""
        self._wait()
        self._digest = hashlib.sha256()

    def seen(self, data: bytes) -> None:
        """Bytes that an earlier run wrote, at once."""
        self._digest.update(data)

    def update(self, data: bytes | memoryview) -> None:
        """The next piece, which must stay as it is; returns when the piece before it is hashed."""
        self._wait()
        self._last = self._pool.submit(self._digest.update, data)

    def hexdigest(self) -> str:
        """Of all pieces."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False)

    def _wait(self) -> None:
        if self._last is not None:
            with behind(), stage("hash"):
                self._last.result()
            self._last = None
