"""Record how far a run got, in one file with one policy for damage.

The policy: nothing that was finished is deleted or used on a guess. A progress file that cannot be read, or that does
not agree with the files beside it, is one line that names the file and what starts over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from .atomic import sha256_file, write_whole
from .parse import is_object

PROGRESS = ".mmquant-progress.json"


def damaged(path: Path, found: str, expected: str, remedy: str | None = None) -> InputError:
    """The error for a file of an unfinished run that cannot be continued from; nothing has been touched.

    remedy: what starts over; by default --fresh, or deleting the folder.
    """
    remedy = remedy or f"--fresh starts over, and so does deleting {path.parent}"
    return InputError(f"{path}: {found}, expected {expected}: damaged; {remedy}")


@dataclass(frozen=True)
class State:
    """What a progress file says: the run, the fingerprint of its plan, units done, SHA-256 of the whole files."""

    run: dict[str, Any]
    plan: str = ""
    done: int = 0
    sha256: dict[str, str] = field(default_factory=dict[str, str])


def read_state(folder: Path) -> State | None:
    """The state of the unfinished run in `folder`, None when there is none. InputError when it is damaged."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise damaged(path, "not JSON", "the progress of a run") from None
    if not is_object(data):
        raise damaged(path, f"a {type(data).__name__}", "the progress of a run")
    kinds: dict[str, type] = {"run": dict, "plan": str, "done": int, "sha256": dict}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind) or isinstance(data[key], bool):
            raise damaged(path, f"{key} is {str(data.get(key))[:40]!r}", f"{key} of type {kind.__name__}")
    if data["done"] < 0 or not all(isinstance(value, str) for value in data["sha256"].values()):
        raise damaged(path, f"done is {data['done']}, sha256 is {str(data['sha256'])[:40]}", "counts and digests")
    return State(data["run"], data["plan"], data["done"], data["sha256"])


def unfinished_run(folder: Path) -> dict[str, Any] | None:
    """What an unfinished run in this folder was doing, None when there is none."""
    state = read_state(folder)
    return None if state is None else state.run


class Progress:
    """The progress of a writer: `done` units of the plan (steps, tensors) are on disk, `sha256` of the whole files.

    Files that a continued run finds finished are checked against their recorded digests beside its work.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], plan: str, units: int) -> None:
        """run: what decides the bytes; plan: a fingerprint of the layout; units: how many there are.

        InputError when the folder holds the damaged progress of a run, or one of another plan.
        """
        self.path, self.run, self.plan = folder / PROGRESS, dict(run), plan
        self._checks: list[Future[None]] = []
        state = read_state(folder)
        self.done, self.sha256 = (state.done, dict(state.sha256)) if state is not None else (0, {})
        if state is None:
            self.save()
        elif state.plan not in ("", plan):
            raise damaged(self.path, "an unfinished run of another layout (another version of mmquant?)", "this one")
        elif self.done > units:
            raise damaged(self.path, f"{self.done} of {units} are done", f"at most {units}")

    def save(self) -> None:
        """Make `done` and `sha256` durable; what they speak of must be so already."""
        state = {"run": self.run, "plan": self.plan, "done": self.done, "sha256": dict(self.sha256)}
        write_whole(self.path, json.dumps(state).encode())

    def clear(self) -> None:
        """Forget how far the run was; called once the manifest is there."""
        self.path.unlink(missing_ok=True)

    def check(self, files: Mapping[str, int]) -> None:
        """Hold the finished files (name -> bytes) of the run that is continued against what is recorded.

        Sizes at once, digests on a thread beside the work (`checked` waits for it). InputError naming the file.
        """
        for name, size in files.items():
            path = self.path.with_name(name)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise damaged(
                    path, "no file" if found is None else f"{found} bytes", f"the {size} bytes that were written"
                )
        pool = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._checks = [pool.submit(self._check_digest, name) for name in files]
        pool.shutdown(wait=False)

    def _check_digest(self, name: str) -> None:
        path, known = self.path.with_name(name), self.sha256.get(name)
        found = sha256_file(path)
        if known is None:  # the run died while it was hashed
            self.sha256[name] = found
        elif found != known:
            raise damaged(
                path, f"SHA-256 {found[:16]}...", f"{known[:16]}... as it was written: the disk may be failing"
            )

    def checked(self) -> None:
        """Wait for the digests of `check`; InputError for the first file that has changed."""
        for check in self._checks:
            check.result()
        self._checks = []
