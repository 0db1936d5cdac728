"""From a hub to an artifact: little disk, killed and continued, with identical bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.command import mmquant
from helpers.hub_server import TOKEN, HubServer
from helpers.killed import kill, until
from helpers.tiny import write_tiny
from mmquant.commands.cli import cli
from mmquant.convert.hub.store import HubFolder
from mmquant.convert.open import demo_folder
from mmquant.errors import PartialError

SHARDS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), shards=SHARDS)
    (folder / "LICENSE").write_text("NON-COMMERCIAL LICENSE\nCopyright (c) 2026 Someone\n")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.seed("org/tiny", {p.name: p.read_bytes() for p in model.iterdir()})
        yield server


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    return {**os.environ, **hub.environment(), "HOME": str(home), "MMQUANT_CACHE": str(home / "cache")}


def run(hub: HubServer, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = mmquant(*arguments, env=environment(hub, home) | more)
    assert TOKEN not in done.stdout + done.stderr
    return done


def shard_request(hub: HubServer, number: int) -> str:
    """What matches the requests for a shard's bytes."""
    data = hub.read("org/tiny", f"model-{number:05}-of-{SHARDS:05}.safetensors")
    return f"GET /cdn/{hashlib.sha256(data).hexdigest()}"


def shards_begun(out: Path) -> int:
    """The highest number of a shard that the run has begun to fetch."""
    names = [p.name for p in out.rglob("shards/model-*")]
    return max((int(n.split("-")[1]) for n in names), default=0)


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "mmquant.fit.json"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_fp8_from_a_hub_is_fp8_from_the_folder_after_kills(hub: HubServer, model: Path, tmp_path: Path) -> None:
    local, out = tmp_path / "local", tmp_path / "out"
    assert run(hub, tmp_path, "fp8", "--model", str(model), "--out", str(local)).returncode == 0
    line = ["fp8", "--model", "hf:org/tiny", "--out", str(out), "--max-shards", "6"]
    peak = 0

    def look(_: str) -> None:
        nonlocal peak
        shards = [p for p in out.rglob("shards/*") if ".json" not in p.name]
        peak = max(peak, len({p.name.removesuffix(".part") for p in shards}))

    hub.watch = look
    for shard, headers in ((7, 1), (10, 0)):  # headers are kept with the work
        hub.hold(shard_request(hub, shard), after=headers)
        process = subprocess.Popen(
            [sys.executable, "-m", "mmquant", *line], env=environment(hub, tmp_path), stderr=subprocess.DEVNULL
        )
        until(process, lambda n=shard: hub.held > 0 and shards_begun(out) >= n)
        kill(process)
        hub.let_go()
    commit = hub.repos["org/tiny"].branches["main"]
    hub.seed("org/tiny", {"README.md": b"a later commit"})
    done = run(hub, tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(local)
    assert 3 <= peak <= 6
    manifest = json.loads((out / "mmquant.fit.json").read_text())
    assert manifest["model"]["base_revision"] == commit
    assert (manifest["model"]["base_model"], manifest["model"]["source"]) == ("org/tiny", "huggingface")
    assert TOKEN not in (out / "mmquant.fit.json").read_text()
    assert not (out / ".mmquant.source").exists()
    made = (out / "mmquant.fit.json").stat().st_mtime_ns
    assert run(hub, tmp_path, *line).returncode == 0  # finished: left as it is
    assert (out / "mmquant.fit.json").stat().st_mtime_ns == made


def test_a_dry_run_and_inspect_need_headers_only(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(hub, tmp_path, "fp8", "--model", "ms:org/tiny", "--out", str(out), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "FP8-block" in done.stdout
    assert not out.exists()
    ranges = [tuple(map(int, c["range"].removeprefix("bytes=").split("-"))) for c in hub.calls("GET /cdn/")]
    assert sum(first == 0 for first, _ in ranges) == SHARDS
    assert all(last - first < 1024 for first, last in ranges if first)  # what tells one checkpoint from another
    assert run(hub, tmp_path, "inspect", "ms:org/tiny").returncode == 0
    assert not [c for c in hub.calls("GET /cdn/") if c["range"] is None]


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_pull_is_continued_after_a_kill(hub: HubServer, model: Path, tmp_path: Path, source: str) -> None:
    hub.hold(shard_request(hub, 5))
    out = tmp_path / "out"
    line = ["pull", "--hub", source, "--repo", "org/tiny", "--out", str(out), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "mmquant", *line], env=environment(hub, tmp_path))
    until(process, lambda: hub.held > 0 and any(out.glob("model-00003*")))
    kill(process)
    hub.let_go()
    hub.log.clear()
    done = run(hub, tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == hub.repos["org/tiny"].branches["main"]
    assert digests(out) == digests(model)
    assert len({c["line"] for c in hub.calls("GET /cdn/")}) < SHARDS
    assert not (out / ".mmquant.source").exists()


def test_a_second_process_in_the_same_folder_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.hold(shard_request(hub, 5))
    line = ["pull", "--model", "hf:org/tiny", "--out", str(tmp_path / "out")]
    first = subprocess.Popen([sys.executable, "-m", "mmquant", *line], env=environment(hub, tmp_path))
    until(first, lambda: hub.held > 0)
    second = run(hub, tmp_path, *line)
    kill(first)
    hub.let_go()
    assert second.returncode == 2
    assert f"in use by process {first.pid} on " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert run(hub, tmp_path, *line).returncode == 0  # the killed one's lock went with it


# -- every command that makes a pass ---------------------------------------------------------------------------------

PASSES = {
    "fp8": ("fp8",),
    "int4": ("int4", "--effort", "high", "--group-size", "32", "--tp", "1", "--windows", "4", "--context", "32"),
    "gguf": ("gguf", "--type", "Q8_0"),
    "calibrate": ("calibrate", "--windows", "4", "--context", "32"),
}


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many shards with the demo's tokenizer, whose layers share shards with their neighbours."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_local_experts": 3}
    shape["vocab_size"] = 2048
    folder = write_tiny(tmp_path_factory.mktemp("readable"), shards=10, **shape)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())
    return folder


@pytest.mark.parametrize("command", [*PASSES, "eval"])
def test_a_pass_fetches_ahead_within_the_limits_and_each_shard_once(
    hub: HubServer, readable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    hub.seed("org/readable", {p.name: p.read_bytes() for p in readable.iterdir()})
    for name, value in (hub.environment() | {"MMQUANT_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    most, plans, fetched = 0, [], []
    plan, obtain = HubFolder.plan, HubFolder._obtain

    def planned(store: HubFolder, shards: list[str]) -> None:
        plans.append(shards)
        plan(store, shards)

    def obtained(store: HubFolder, name: str) -> tuple[Path, bool]:
        nonlocal most
        fetched.append(name)
        files = {p.name.removesuffix(".part") for p in store.folder.rglob("shards/model-*") if ".json" not in p.name}
        most = max(most, len(files | {name}))
        return obtain(store, name)

    monkeypatch.setattr(HubFolder, "plan", planned)
    monkeypatch.setattr(HubFolder, "_obtain", obtained)
    if command == "eval":
        line = ["eval", str(readable), "--reference", "hf:org/readable", "--windows", "4", "--context", "32"]
    else:
        line = [*PASSES[command], "--model", "hf:org/readable", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*line, "--max-shards", "7"])
    assert result.exit_code == 0, result.output
    assert len(plans) == 1
    assert sorted(plans[0]) == sorted(fetched) == sorted(p.name for p in readable.glob("model-*.safetensors"))
    assert most <= 7
    assert not list(tmp_path.rglob("shards/model-*"))


ERRORS = [
    (("pull", "--model", "hf:org/none"), 2, "not found"),
    (("pull", "--model", "hf:org/tiny@gone"), 2, "no such revision"),
    (("pull", "--model", "hf:org"), 2, "expected hf:ORG/NAME"),
    (("pull", "--model", "hf:org/tiny", "--include", "*.bin"), 2, "none of the"),
    (("pull", "--revision", "x"), 2, "go with --repo"),
    (("fp8", "--model", "hf:org/tiny", "--max-disk", "10KB"), 2, "--max-disk 10,000"),
    (("fp8", "--model", "hf:org/tiny", "--max-shards", "1"), 2, "expected at least 2"),
    (("fp8", "--model", "ms:org/none"), 2, "not found"),
]


@pytest.mark.parametrize("arguments, code, text", ERRORS)
def test_errors_are_one_line(hub: HubServer, tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = run(hub, tmp_path, *arguments, "--out", str(tmp_path / "out"))
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert text in done.stderr


def test_offline_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "pull", "--model", "hf:org/tiny", "--out", str(tmp_path / "o"), HF_HUB_OFFLINE="1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_a_network_that_gives_up_is_exit_3_and_the_next_run_ends_it(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmquant.convert.hub.http.Client.pause", lambda *_: None)  # minutes otherwise
    for name, value in (hub.environment() | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    lost = hub.read("org/tiny", "model-00007-of-00012.safetensors")
    fault = hub.fault(f"GET /cdn/{hashlib.sha256(lost).hexdigest()}", status=503, times=99)
    line = ["pull", "--model", "hf:org/tiny", "--out", str(tmp_path / "out")]
    with pytest.raises(PartialError, match=r"HTTP 503, 9 attempts; run the command again .* of 15 files are here"):
        CliRunner().invoke(cli, line, catch_exceptions=False)
    assert not (tmp_path / "out" / "model-00007-of-00012.safetensors").exists()
    fault.times = 0
    assert CliRunner().invoke(cli, line).exit_code == 0
    assert digests(tmp_path / "out") == digests(model)


FILLED = """
mount -t tmpfs -o size=6m none $DISK
mkdir -p $DISK/out/.mmquant.source/x
{mount}
$MMQUANT 2> $LOG & run=$!
until ls $DISK/out/.mmquant.source/*/shards/model-00003* > /dev/null 2>&1; do kill -0 $run || exit 9; sleep 0.01; done
cat /dev/zero > $FULL/other 2> /dev/null
touch $RESULT.full
wait $run; echo $? >> $LOG
rm $FULL/other
$MMQUANT 2>> $LOG; echo $? >> $LOG
cp -r $DISK/out $RESULT
"""
SHARDS_ELSEWHERE = """mkdir $DISK.more
mount -t tmpfs -o size=6m none $DISK.more
mount --bind $DISK.more $DISK/out/.mmquant.source"""


@pytest.mark.parametrize("full", ["writing", "fetching"])
def test_a_disk_that_fills_up_is_one_line_and_the_next_run_ends_it(
    hub: HubServer, model: Path, tmp_path: Path, full: str
) -> None:
    """Shards and output on two real file systems, one of which another process fills while the command runs."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    hub.hold(shard_request(hub, 4), after=1)  # the first brings its header
    line = f"{sys.executable} -m mmquant fp8 --model hf:org/tiny --out {disk}/out --max-shards 6"
    more = {"DISK": str(disk), "LOG": str(log), "MMQUANT": line, "RESULT": str(tmp_path / "result")}
    more["FULL"] = str(disk if full == "writing" else f"{disk}.more")
    script = FILLED.format(mount=SHARDS_ELSEWHERE)
    process = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], env=environment(hub, tmp_path) | more)
    until(process, (tmp_path / "result.full").exists)
    hub.let_go()
    process.wait()
    lines = log.read_text().splitlines()
    assert process.returncode == 0, lines
    assert lines[1] == "5"
    assert lines[-1] == "0"
    assert "full" in lines[0] or "No space left" in lines[0] or "free" in lines[0]
    assert run(hub, tmp_path, "fp8", "--model", str(model), "--out", str(tmp_path / "local")).returncode == 0
    assert digests(tmp_path / "result") == digests(tmp_path / "local")


@pytest.mark.parametrize("size, command", [("1200k", "pull"), ("1800k", "fp8")])
def test_a_small_disk_is_one_line_and_exit_5(hub: HubServer, tmp_path: Path, size: str, command: str) -> None:
    """A real file system of that size: too small for the shards (pull), or for the output beside a few of them."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    disk = tmp_path / "disk"
    disk.mkdir()
    line = f"{sys.executable} -m mmquant {command} --model hf:org/tiny --out {disk}/out"
    shell = f"mount -t tmpfs -o size={size} none {disk} && exec {line}"
    arguments = ["unshare", "-rm", "sh", "-c", shell]
    done = subprocess.run(arguments, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
    assert "free" in done.stderr or "full" in done.stderr
