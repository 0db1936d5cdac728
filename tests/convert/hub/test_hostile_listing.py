"""A lying hub writes nothing outside the work folder: names, digests and sizes are checked first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.hub_server import HubServer, git_sha1
from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.hub.http import HubError, Retry, TransferError
from mmquant.convert.hub.listing import RepoFile
from mmquant.convert.hub.store import FetchOptions, hub_source
from mmquant.errors import MmquantError
from mmquant.runs.pull import fetch_files

QUICK = Retry(attempts=1, base=0.001, cap=0.002, stall=2.0)
CLIMBS = [
    "../../../evil.pth",
    "/tmp/evil.pth",
    "..",
    "a/../../evil",
    "C:/evil",
    "c:evil",
    "..\\evil",
    "evil\0",
    ".. /evil",
]
ALIKE = [
    "\uff0e\uff0e/evil",
    "\u2024\u2024/evil",
    "a\uff0f\uff0fb",
    "..\uff3cevil",
    "a/\u2025/evil",
    "\u202eevil",
    "a\ud800",
]
NAMES = [
    *CLIMBS,
    *ALIKE,
    "",
    "/",
    "a//b",
    ".git/hooks/post-checkout",
    "x/.GIT/config",
    "n" * 300,
    "d/" * 600 + "x",
    "a\nb",
    ".",
]
DIGESTS = [
    *NAMES,
    "0" * 63,
    "0" * 65,
    "0" * 40,
    "A" * 64,
    "\uff10" * 64,
    "0" * 64 + "\n",
    "sha256:" + "0" * 64,
    "g" * 64,
]
SIZES = [-1, 1 << 62, 10**30, 1e9, "7", True, None, [], {}, float("1e300")]
OTHERS = [None, 5, [], {}, [None], {"oid": None}, "x", True, -1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), shards=1)
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path_factory.mktemp("caches"))
        server.seed("org/m", {p.name: p.read_bytes() for p in folder.iterdir()} | {"evil": b"evil"})
        yield server


@pytest.fixture(autouse=True)
def honest_again(hub: HubServer) -> None:
    hub.twist = lambda kind, items: items
    hub.faults.clear()


@st.composite
def lie(draw: st.DrawFn) -> tuple[str, Any]:
    """(the entry's field, what the hub says it is)."""
    field = draw(st.sampled_from(["path", "oid", "sha256", "size", "lfs", "entry"]))
    pools = {"path": NAMES, "oid": DIGESTS, "sha256": DIGESTS, "size": SIZES, "lfs": OTHERS, "entry": OTHERS}
    pool = pools[field]
    if field in ("path", "oid", "sha256") and draw(st.booleans()):
        return field, draw(st.text(max_size=70) | st.lists(st.sampled_from(CLIMBS), max_size=4).map("/".join))
    return field, draw(st.sampled_from([*pool, *OTHERS]))


def told(hub: str, item: dict[str, Any], field: str, value: Any) -> Any:
    """One entry of a listing, with the lie in it, in the hub's own form."""
    if field == "entry":
        return value
    if hub == "ms":
        return item | {{"path": "Path", "size": "Size", "lfs": "Type"}.get(field, "Sha256"): value}
    if field == "sha256":
        return item | {"lfs": {**(item.get("lfs") or {"size": item["size"]}), "oid": value}}
    if field == "size" and "lfs" in item:
        return item | {"lfs": {**item["lfs"], "size": value}}
    return item | {field: value}


def everything(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*")}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(["hf", "ms"]), victim=st.integers(0, 3), how=lie())
def test_no_lie_of_a_listing_leaves_the_work_folder(
    hub: HubServer, tmp_path: Path, where: str, victim: int, how: tuple[str, Any]
) -> None:
    box = tmp_path / str(len(list(tmp_path.iterdir()))) / "deep" / "er"
    box.mkdir(parents=True)
    top, work, out = box.parent.parent, box / "work", box / "out"

    def twist(kind: str, items: list[Any]) -> list[Any]:
        at = victim % len(items)
        return [told(kind, item, *how) if i == at else item for i, item in enumerate(items)]

    hub.twist = twist
    for act in (lambda: opened(f"{where}:org/m", work), lambda: pulled(f"{where}:org/m", out)):
        with contextlib.suppress(MmquantError, OSError):
            act()
    outside = {p for p in everything(top) if not (p.is_relative_to(work) or p.is_relative_to(out) or p in box.parents)}
    assert outside <= {top / "deep", box}
    assert not Path("/tmp/evil.pth").exists()
    assert not any(".git" in p.relative_to(top).parts for p in everything(top))


def opened(spec: str, work: Path) -> None:
    store = hub_source(spec, FetchOptions(work=work, retry=QUICK))
    try:
        Checkpoint(store).validate()
    finally:
        store.close()


def pulled(spec: str, out: Path) -> None:
    work = out / ".mmquant.source"
    store = hub_source(spec, FetchOptions(work=work, retry=QUICK, keep_shards=True, max_shards=None))
    fetch_files(store, sorted(store.files()), out)


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_digest_is_hexadecimal_or_refused(digest: str) -> None:
    for fields in ({"sha256": digest}, {"sha256": "0" * 64, "git": digest}, {"sha256": None, "git": digest}):
        if digest != "0" * 40 or "git" not in fields:
            with pytest.raises(HubError, match="expected hexadecimal digits"):
                RepoFile("model.safetensors", 5, **fields)
    assert RepoFile("x", 0, None, git_sha1(b"")).digest == git_sha1(b"")


def test_bytes_that_nothing_vouches_for_are_not_fetched(hub: HubServer, tmp_path: Path) -> None:
    """ModelScope may leave Sha256 empty: then only the size could be compared, so the file is refused by its name."""
    hub.twist = lambda kind, items: [i | {"Sha256": ""} if i["Path"] == "config.json" else i for i in items]
    with pytest.raises(HubError, match=r"config\.json: the hub names no SHA-256"):
        opened("ms:org/m", tmp_path / "w")
    with pytest.raises(HubError, match=r"config\.json: the hub names no SHA-256"):
        pulled("ms:org/m", tmp_path / "o")
    assert not list(tmp_path.rglob("config.json"))


def test_an_endless_listing_ends(hub: HubServer, tmp_path: Path) -> None:
    loop = f'<{hub.url}/api/models/org/m/tree/{hub.repos["org/m"].branches["main"]}?recursive=true>; rel="next"'
    hub.fault("GET /api/models/org/m/tree", status=200, headers={"Link": loop}, times=50)
    with pytest.raises(HubError):
        opened("hf:org/m", tmp_path / "w")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://[", "http://a:99999999/x", "ftp://a/b"])
def test_a_redirect_goes_to_an_address_or_nowhere(hub: HubServer, tmp_path: Path, location: str) -> None:
    hub.fault("GET /org/m/resolve/.*safetensors", status=302, headers={"Location": location}, times=50)
    with pytest.raises(TransferError, match="sends us to"):
        opened("hf:org/m", tmp_path / "w")


def test_a_body_is_never_longer_than_the_listing_says(hub: HubServer, tmp_path: Path) -> None:
    hub.twist = lambda kind, items: [i | {"size": 5} if i["path"] == "config.json" else i for i in items]
    with pytest.raises(TransferError, match="expected at most 5"):
        opened("hf:org/m", tmp_path / "w")
    assert os.listdir(tmp_path / "w")  # the record of the listing, and nothing that was not checked
    assert not list((tmp_path / "w").rglob("small/*"))
