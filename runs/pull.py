"""Download a repository into a folder, verified and resumable."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import PartialError

from .models import WORK

if TYPE_CHECKING:
    from ..convert.hub.store import HubFolder

TOGETHER = 2  # files at once; each comes in parallel ranges


def pull(store: HubFolder, names: list[str], out: Path) -> None:
    """Bring the named files into `out`; a file that is there with the listed digest is kept.

    Raises PartialError when the network gives up in between.
    """
    from ..convert.files.atomic import copy_whole, replace_whole
    from ..convert.hub.fetch import need_disk, on_disk, part_digest
    from ..convert.hub.http import TransferError

    todo = [n for n in names if not _is_whole(store, out / n, n, part_digest)]
    out.mkdir(parents=True, exist_ok=True)
    arrived = sum(on_disk(path) for path in (out / WORK).rglob("shards/*"))
    need_disk(out, max(0, sum(store.files()[n] for n in todo) - arrived), store.label)

    def one(name: str) -> None:
        path = store.path(name)
        final = out / name
        final.parent.mkdir(parents=True, exist_ok=True)
        if path.is_relative_to(store.folder):
            replace_whole(path, final)
        else:  # a hub's own cache
            copy_whole(path, final)

    try:
        with ThreadPoolExecutor(TOGETHER) as pool:
            for _ in pool.map(one, todo):
                pass
    except TransferError as error:
        here = sum((out / name).is_file() for name in names)
        raise PartialError(f"{error} ({here} of {len(names)} files are here)") from None
    finally:
        store.close()
    shutil.rmtree(out / WORK, ignore_errors=True)


def _is_whole(store: HubFolder, path: Path, name: str, digest: Any) -> bool:
    file = store.listing.files[name]
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest(path, file) == file.digest
