"""A checkpoint on a hub behaves as a folder does, with little traffic and little disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.hub_server import HubServer
from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.files.lock import hold
from mmquant.convert.hub.http import HubError, Retry, TransferError
from mmquant.convert.hub.pin import default_work
from mmquant.convert.hub.store import FetchOptions, HubFolder, hub_source

SHARDS = 12
QUICK = Retry(attempts=3, base=0.01, cap=0.05, stall=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), shards=SHARDS)
    (folder / "LICENSE").write_text("NON-COMMERCIAL LICENSE\nCopyright (c) 2026 Someone\n")
    return folder


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        server.seed("org/tiny", {p.name: p.read_bytes() for p in model.iterdir()})
        yield server


def options(work: Path | None = None, **changes: object) -> FetchOptions:
    return replace(FetchOptions(work=work, retry=QUICK, block=20_000), **changes)  # type: ignore[arg-type]


def shard_files(work: Path) -> list[Path]:
    return [p for p in work.rglob("shards/*") if p.is_file() and ".json" not in p.name]


def disk(work: Path) -> int:
    """Bytes that shards take, half fetched ones at their full length."""
    total = 0
    for path in shard_files(work):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_a_hub_is_a_folder(hub: HubServer, model: Path, tmp_path: Path, source: str) -> None:
    local = open_checkpoint(model)
    store = hub_source(f"{source}:org/tiny", options(tmp_path / "w"))
    remote = Checkpoint(store)
    remote.validate(scales=False)
    assert remote.fingerprint == local.fingerprint
    assert remote.tensors == local.tensors
    assert remote.small_file("LICENSE") == local.small_file("LICENSE")
    assert remote.small_file("none.txt") is None
    for name in ("model.norm.weight", "model.layers.2.block_sparse_moe.experts.4.w2.weight"):
        assert torch.equal(remote.read(name), local.read(name))
    assert (store.hub, store.repo, store.revision) == (source, "org/tiny", hub.repos["org/tiny"].branches["main"])


def test_headers_come_by_ranges_before_any_shard(hub: HubServer, model: Path, tmp_path: Path) -> None:
    source = Checkpoint(hub_source("hf:org/tiny", options(tmp_path / "w")))
    source.validate(scales=False)
    ranges = [c["range"] for c in hub.calls("GET /cdn/")]
    assert len(ranges) == SHARDS
    assert all(r and r.startswith("bytes=0-") for r in ranges)
    assert shard_files(tmp_path) == []
    hub.log.clear()
    again = Checkpoint(hub_source("hf:org/tiny", options(tmp_path / "w")))
    assert again.tensors == source.tensors
    assert hub.log == []  # listing, small files and headers are kept with the work


def test_long_headers_take_a_second_request(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmquant.convert.hub.store.HEADER_GUESS", 64)
    Checkpoint(hub_source("hf:org/tiny", options(tmp_path / "w"))).validate(scales=False)
    assert len(hub.calls("GET /cdn/")) == 2 * SHARDS


def test_the_commit_is_pinned_for_all_later_requests(hub: HubServer, model: Path, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w"))
    before = Checkpoint(store).fingerprint
    changed = {p.name: p.read_bytes() for p in write_tiny(tmp_path / "other", shards=SHARDS, seed=7).iterdir()}
    hub.seed("org/tiny", changed)
    names = [n for n in store.files() if n.endswith(".safetensors")]
    assert store.path(names[0]).read_bytes() == (model / names[0]).read_bytes()
    store.close()
    # The next run in the same work folder goes on with the commit that it began with, an explicit one is taken.
    assert Checkpoint(hub_source("hf:org/tiny", options(tmp_path / "w"))).fingerprint == before
    assert Checkpoint(hub_source("hf:org/tiny", options(tmp_path / "w2"))).fingerprint != before
    assert Checkpoint(hub_source(f"hf:org/tiny@{store.revision}", options(tmp_path / "w3"))).fingerprint == before


def walk(store: HubFolder, names: list[str], together: int = 1, look: Callable[[], None] = lambda: None) -> None:
    """Use shards as a pass over layers does: each with its predecessor, which is then released."""
    store.plan(names)
    for at, name in enumerate(names):
        assert hashlib.sha256(store.path(name).read_bytes()).hexdigest() == store.listing.files[name].sha256
        look()
        if at >= together - 1:
            store.release(names[at - together + 1])


def shards_of(store: HubFolder) -> list[str]:
    return sorted(n for n in store.files() if n.endswith(".safetensors"))


@pytest.mark.parametrize("limits", [{"max_shards": 2}, {"max_shards": 4}, {"max_disk": 3 * 330_000}])
def test_shards_on_disk_stay_within_the_limits(hub: HubServer, tmp_path: Path, limits: dict[str, int]) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", **limits))
    names, peak, files = shards_of(store), 0, 0
    largest = max(store.files()[n] for n in names)

    def look(*_: object) -> None:
        nonlocal peak, files
        peak = max(peak, disk(tmp_path / "w"))
        files = max(files, len({p.name.removesuffix(".part") for p in shard_files(tmp_path / "w")}))

    hub.watch = look  # while shards arrive
    walk(store, names, together=2, look=look)
    store.release(names[-1])
    limit = limits.get("max_disk", limits.get("max_shards", 0) * largest)
    assert 2 * min(store.files()[n] for n in names) <= peak <= limit
    assert files <= limits.get("max_shards", SHARDS)
    assert shard_files(tmp_path / "w") == []


def test_the_next_shards_arrive_while_one_is_used(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=4))
    names = shards_of(store)
    store.plan(names)
    first = store.path(names[0])
    while len([p for p in shard_files(tmp_path / "w") if not p.name.endswith(".part")]) < 4:
        time.sleep(0.01)  # for good, if they do not come by themselves
    assert {p.name for p in shard_files(tmp_path / "w")} == set(names[:4])
    assert first.name == names[0]


def test_a_shard_out_of_order_displaces_what_was_fetched_ahead(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=2))
    names = shards_of(store)
    store.plan(names)
    store.path(names[0])
    assert store.path(names[-1]).name == names[-1]
    with pytest.raises(ValueError, match="beside 2 shards in use: --max-shards 2, expected at least 3"):
        store.path(names[5])
    store.release(names[0])
    assert store.path(names[5]).name == names[5]


def test_without_a_plan_the_longest_unasked_shard_goes(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=4))
    for name in [*shards_of(store), *shards_of(store)]:
        assert store.path(name).is_file()
        assert len(shard_files(tmp_path / "w")) <= 4


def test_a_limit_below_one_shard_is_refused_at_once(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_disk=1000))
    with pytest.raises(ValueError, match=r"--max-disk 1,000: shard .* alone has [\d,]+ bytes"):
        store.plan(shards_of(store))


def test_keep_shards_keeps_all_and_fetches_none_again(hub: HubServer, model: Path, tmp_path: Path) -> None:
    for expected in (SHARDS, 0):
        hub.log.clear()
        store = hub_source("hf:org/tiny", options(tmp_path / "w", keep_shards=True, max_shards=1, block=1 << 30))
        walk(store, shards_of(store))
        store.close()
        assert len(hub.calls("GET /cdn/")) == expected
    kept = {p.name: p.read_bytes() for p in shard_files(tmp_path / "w")}
    assert kept == {p.name: p.read_bytes() for p in model.glob("*.safetensors")}


def test_what_an_earlier_run_left_counts_and_goes_when_unused(hub: HubServer, tmp_path: Path) -> None:
    first = hub_source("hf:org/tiny", options(tmp_path / "w", keep_shards=True))
    names = shards_of(first)
    for name in names[:6]:
        first.path(name)
    first.close()
    second = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=3))
    second.plan(names[4:])
    assert {p.name.removesuffix(".part") for p in shard_files(tmp_path / "w")} <= set(names[4:7])
    hub.log.clear()
    assert second.path(names[4]).is_file()
    assert not [c for c in hub.calls("resolve") if names[4] in c["line"]]


def test_two_processes_do_not_share_a_folder(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w"))
    store.folder.mkdir(parents=True)
    with hold(store.folder):
        code = f"""
from pathlib import Path
from mmquant.convert.hub.store import FetchOptions, hub_source
try:
    store = hub_source("hf:org/tiny", FetchOptions(work=Path({str(tmp_path / "w")!r})))
    store.path({shards_of(store)[0]!r})
except ValueError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"in use by process {os.getpid()} on " in done.stdout
    assert store.path(shards_of(store)[0]).is_file()  # the holder has gone


def cache_as_the_client_does(model: Path, home: Path, commit: str, names: list[str]) -> Path:
    """huggingface_hub's layout: blobs by digest, a snapshot of links, the branch in refs."""
    root = home / "hub" / "models--org--tiny"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", snapshot, root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name in names:
        data = (model / name).read_bytes()
        large = name.endswith(".safetensors") or len(data) > 1 << 16
        digest = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        (root / "blobs" / digest.hexdigest()).write_bytes(data)
        (snapshot / name).symlink_to(root / "blobs" / digest.hexdigest())
    return root


def test_the_hubs_own_cache_is_used_when_its_bytes_are_right(hub: HubServer, model: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in model.iterdir())
    root = cache_as_the_client_does(model, tmp_path / "hf", hub.repos["org/tiny"].branches["main"], names)
    store = hub_source("hf:org/tiny", options(tmp_path / "w"))
    shards = shards_of(store)
    broken = root / "snapshots" / store.revision / shards[1]
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.resolve().write_bytes(data)
    walk(store, shards)
    fetched = {c["line"].split()[1].rsplit("/", 1)[-1] for c in hub.calls("GET /org/tiny/resolve")}
    assert fetched == {shards[1]}
    assert all((root / "snapshots" / store.revision / n).exists() for n in names)  # never deleted: not ours


def test_offline_works_from_the_cache_alone(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(p.name for p in model.iterdir())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        hub_source("hf:org/tiny", options())
    cache_as_the_client_does(model, tmp_path / "hf", hub.repos["org/tiny"].branches["main"], names)
    source = Checkpoint(hub_source("hf:org/tiny", options()))
    assert source.fingerprint == open_checkpoint(model).fingerprint
    assert source.read("model.norm.weight").shape == (192,)
    assert hub.log == []


def test_a_hub_that_is_down_does_not_stop_a_run_that_knows_its_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = hub_source("hf:org/tiny", options()).revision
    hub.fault("GET /api/", status=503, times=99)
    assert hub_source("hf:org/tiny", options()).revision == commit
    with pytest.raises(TransferError, match="HTTP 503 after 4 attempts"):
        hub_source("hf:org/tiny@other", options())


def test_modelscopes_cache_is_used(hub: HubServer, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ms" / "models" / "org" / "tiny"
    shutil.copytree(model, folder)
    store = hub_source("ms:org/tiny", options(tmp_path / "w"))
    walk(store, shards_of(store))
    assert hub.calls("GET /cdn/") == hub.calls("GET /api/v1/models/org/tiny/repo\\?") == []


def test_a_failed_shard_fails_its_reader_and_can_be_asked_again(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w"))
    name = shards_of(store)[0]
    hub.fault("GET /cdn/", status=500, times=999)
    with pytest.raises(TransferError, match="HTTP 500"):
        store.path(name)
    hub.faults.clear()
    assert store.path(name).is_file()


def test_xet_that_stalls_is_killed_and_ranges_take_over(hub: HubServer, tmp_path: Path) -> None:
    patient = replace(QUICK, stall=600.0)
    store = hub_source("hf:org/tiny", options(tmp_path / "w", transport="xet", retry=patient))
    names = shards_of(store)
    assert hashlib.sha256(store.path(names[0]).read_bytes()).hexdigest() == store.listing.files[names[0]].sha256
    assert hub.calls("HEAD /org/tiny/resolve")  # the hub's own client came
    hub.hold("HEAD /org/tiny/resolve")
    store = hub_source("hf:org/tiny", options(tmp_path / "w2", transport="xet", retry=replace(QUICK, stall=3.0)))
    assert hashlib.sha256(store.path(names[1]).read_bytes()).hexdigest() == store.listing.files[names[1]].sha256
    assert not list(tmp_path.rglob("*.xet"))


def test_shards_outside_the_plan_give_way_and_the_planned_ones_stay(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=6))
    names = shards_of(store)
    store.plan(names[9:])  # as a continued pass does, whose calibration replays the layers before
    for name in names[:9]:
        assert store.path(name).is_file()
    walk(store, names[9:])
    for name in names:  # as the check of a finished artifact does
        assert store.path(name).is_file()
        assert len(shard_files(tmp_path / "w")) <= 6


def test_what_is_in_flight_follows_the_limits(hub: HubServer, tmp_path: Path) -> None:
    store = hub_source("hf:org/tiny", options(tmp_path / "w", max_shards=3))
    sizes = sorted((s for n, s in store.files().items() if n.endswith(".safetensors")), reverse=True)
    assert store.in_flight() == sum(sizes[:3])
    assert hub_source("hf:org/tiny", options(tmp_path / "w", max_disk=1000)).in_flight() == 1000
    keeping = hub_source("hf:org/tiny", options(tmp_path / "w", keep_shards=True))
    assert keeping.in_flight() == sum(sizes)
    first = keeping.path(shards_of(keeping)[0])
    assert keeping.in_flight() == sum(sizes) - first.stat().st_size


def test_every_process_of_torchrun_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMQUANT_CACHE", str(tmp_path))
    found = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        found.append(default_work())
    assert found == [tmp_path, tmp_path / "rank-1", tmp_path / "rank-2"]
