"""The fetcher against a real HTTP server: every fault ends in the right bytes or in one line."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from helpers.hub_server import TOKEN, HubServer, git_sha1
from helpers.killed import kill, until
from helpers.paths import ROOT
from mmquant.convert.hub.body import body, fetch_range
from mmquant.convert.hub.fetch import Job, fetch
from mmquant.convert.hub.http import Client, Endpoint, HubError, Retry, TransferError
from mmquant.convert.hub.hubs import HUBS, endpoint_of, file_url, list_repo, parse_spec
from mmquant.convert.hub.listing import RepoSpec
from mmquant.convert.hub.prefetch import DaemonPool

DATA = random.Random(1).randbytes(300_007)
BLOCK = 40_000
QUICK = Retry(attempts=4, base=0.01, cap=0.05, stall=0.4)
NAME = "model-00001-of-00001.safetensors"
FILES = {"config.json": b'{"model_type": "minimax_m2"}', NAME: DATA, "sub/empty.txt": b"", "README.md": b"# card\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        server.seed("org/m", FILES)
        yield server


def client_of(hub: str) -> Client:
    return Client(endpoint_of(hub), QUICK)


def job_of(client: Client, hub: str, folder: Path, name: str = NAME, block: int = BLOCK) -> Job:
    listing = list_repo(client, parse_spec(f"{hub}:org/m"))
    url = file_url(client.endpoint.url, listing.pinned, name)
    return Job(url, listing.files[name], folder / name, f"{hub}:org/m {name}", block)


def get(hub: str, folder: Path, **changes: object) -> Path:
    client = client_of(hub)
    return fetch(client, replace(job_of(client, hub, folder), **changes), DaemonPool(4))  # type: ignore[arg-type]


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != NAME)


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_a_file_arrives_in_exact_ranges_and_leaves_nothing_behind(hub: HubServer, tmp_path: Path, source: str) -> None:
    assert get(source, tmp_path).read_bytes() == DATA
    assert leftovers(tmp_path) == []
    ranges = sorted(c["range"] for c in hub.calls("GET /cdn/"))
    assert ranges == sorted(f"bytes={a}-{min(a + BLOCK, len(DATA)) - 1}" for a in range(0, len(DATA), BLOCK))


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_the_listing_has_sizes_and_digests_of_one_commit(hub: HubServer, source: str) -> None:
    first = hub.repos["org/m"].branches["main"]
    hub.seed("org/m", {"later.txt": b"x"})
    listing = list_repo(client_of(source), RepoSpec(source, "org/m", first))
    assert listing.commit == first
    assert {p: f.size for p, f in listing.files.items()} == {p: len(d) for p, d in FILES.items()}
    assert listing.files[NAME].sha256 == hashlib.sha256(DATA).hexdigest()
    if source == "hf":
        assert listing.files["README.md"].git == git_sha1(FILES["README.md"])
    head = list_repo(client_of(source), parse_spec(f"{source}:org/m"))
    assert head.commit == hub.repos["org/m"].branches["main"] != first


def test_a_listing_of_many_pages_is_read_to_its_end(hub: HubServer) -> None:
    hub.page = 3
    hub.seed("org/m", {f"d{i}/f{i}.txt": b"%d" % i for i in range(20)})
    assert len(list_repo(client_of("hf"), parse_spec("hf:org/m")).files) == len(FILES) + 20


def test_modelscope_lists_by_folders_beyond_its_cut(hub: HubServer) -> None:
    hub.seed("org/m", {f"d{i % 3}/f{i}.txt": b"" for i in range(3200)})
    assert len(list_repo(client_of("ms"), parse_spec("ms:org/m")).files) == len(FILES) + 3200


@pytest.mark.parametrize("tenth", range(10))
def test_a_connection_cut_at_each_tenth_goes_on_where_it_broke(hub: HubServer, tmp_path: Path, tenth: int) -> None:
    hub.fault("GET /cdn/", cut=len(DATA) * tenth // 10)
    assert get("hf", tmp_path, block=len(DATA)).read_bytes() == DATA
    ranges = [c["range"] for c in hub.calls("GET /cdn/")]
    begun = int(ranges[1].removeprefix("bytes=").split("-")[0])
    assert len(ranges) == 2
    assert 0 <= begun <= len(DATA) * tenth // 10
    assert begun > 0 or tenth == 0


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_a_flipped_byte_is_found_and_fetched_again(hub: HubServer, tmp_path: Path, source: str) -> None:
    hub.fault("GET /cdn/", flip=1234)
    assert get(source, tmp_path).read_bytes() == DATA


def test_bytes_that_stay_wrong_are_refused_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", flip=1234, times=99)
    with pytest.raises(TransferError, match=f"hash to .* the listing says {hashlib.sha256(DATA).hexdigest()}"):
        get("hf", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_checked_by_their_git_digest(hub: HubServer, tmp_path: Path) -> None:
    client = client_of("hf")
    job = job_of(client, "hf", tmp_path, "config.json")
    hub.fault("GET /org/m/resolve/.*config.json", flip=3, times=99)
    with pytest.raises(TransferError, match="hash to"):
        fetch(client, job, DaemonPool(1))


def test_a_wrong_length_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", total=len(DATA) + 1, times=99)
    with pytest.raises(TransferError, match=r"'bytes .*/300008', expected 'bytes .*/300007'"):
        get("hf", tmp_path)


def test_a_server_without_ranges_is_read_in_one_stream(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", ignore_range=True, times=99)
    assert get("hf", tmp_path).read_bytes() == DATA
    assert hub.calls("GET /cdn/")[-1]["range"] is None


def test_one_ignored_range_among_others_is_never_spliced(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", times=3)  # let three pass
    hub.fault("GET /cdn/", ignore_range=True)
    assert get("hf", tmp_path).read_bytes() == DATA
    assert [c["range"] for c in hub.calls("GET /cdn/")].count(None) == 1


def test_too_many_requests_are_waited_out_as_asked(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /api/models/org/m/tree", status=429, headers={"Retry-After": "1"})
    hub.fault("GET /cdn/", status=429, headers={"ratelimit": '"resolvers";r=0;t=1'})
    assert get("hf", tmp_path).read_bytes() == DATA
    listings = [c["time"] for c in hub.calls("GET /api/models/org/m/tree")]
    assert listings[1] - listings[0] >= 1.0
    first = hub.calls("GET /cdn/")[0]
    again = [c for c in hub.calls("GET /cdn/|GET /org/m/resolve") if c["range"] == first["range"]]
    assert again[-1]["time"] - first["time"] >= 1.0


def test_a_wait_of_hours_is_told_instead_of_waited(hub: HubServer) -> None:
    hub.fault("GET /api/models/org/m", status=429, headers={"Retry-After": "7200"})
    with pytest.raises(TransferError, match="asks to wait 7200 s"):
        list_repo(client_of("hf"), parse_spec("hf:org/m"))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_errors_are_tried_again(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.fault("GET /cdn/", status=status, times=3)
    hub.fault("GET /api/models/", status=status)
    assert get("hf", tmp_path).read_bytes() == DATA


def test_server_errors_that_last_end_in_one_line(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", status=503, times=999)
    with pytest.raises(TransferError, match="HTTP 503, 5 attempts; run the command again to continue"):
        get("hf", tmp_path)


@pytest.mark.parametrize("how", [{"hang": True}, {"trickle": 0.005, "times": 1}])
def test_a_stall_is_given_up_and_tried_again(hub: HubServer, tmp_path: Path, how: dict[str, float]) -> None:
    hub.fault("GET /cdn/", **how)
    assert get("hf", tmp_path, block=len(DATA)).read_bytes() == DATA
    assert len(hub.calls("GET /cdn/")) >= 2  # more only where this machine itself stalls


def test_an_expired_address_is_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("GET /cdn/", times=2)
    hub.fault("GET /cdn/", status=403, times=2)
    assert get("hf", tmp_path).read_bytes() == DATA
    assert len(hub.calls("GET /org/m/resolve")) >= 2
    (tmp_path / NAME).unlink()
    hub.fault("GET /cdn/", status=403, times=999)
    with pytest.raises(TransferError, match="HTTP 403"):
        get("hf", tmp_path)


def test_the_hub_is_not_asked_for_every_range(hub: HubServer, tmp_path: Path) -> None:
    client = client_of("hf")
    fetch(client, job_of(client, "hf", tmp_path, block=5000), DaemonPool(2))
    assert len(hub.calls("GET /cdn/")) == 61
    assert len(hub.calls("GET /org/m/resolve")) <= 2


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_the_token_stays_with_the_hub(hub: HubServer, tmp_path: Path, source: str) -> None:
    get(source, tmp_path)
    assert all(c["secret"] for c in hub.calls(".") if not c["cdn"])
    assert not any(c["secret"] for c in hub.calls(".") if c["cdn"])
    assert hub.calls("GET /cdn/")


def test_the_token_is_in_no_text(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts = [repr(endpoint_of("hf")), str(endpoint_of("ms"))]
    hub.fault("GET /cdn/", status=503, times=999)
    for source in ("hf", "ms"):
        with pytest.raises(TransferError) as caught:
            get(source, tmp_path)
        texts.append(str(caught.value))
    texts += [p.read_text(errors="replace") for p in tmp_path.rglob("*.json")]
    assert TOKEN not in caplog.text + "".join(texts)


def first_bytes(spec: str) -> bytes:
    client = client_of(spec[:2])
    listing = list_repo(client, parse_spec(spec))
    return fetch_range(client, file_url(client.endpoint.url, listing.pinned, NAME), 0, 10, len(DATA), spec)


def refused(spec: str) -> str:
    with pytest.raises(HubError) as caught:
        first_bytes(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_say_what_to_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for source in ("hf", "ms"):
        assert "not found" in refused(f"{source}:org/none")
        assert "no such revision" in refused(f"{source}:org/m@v9")
    hub.seed("org/gated", {NAME: DATA}, gated=True)
    assert "gated (HTTP 403), accept its conditions" in refused("hf:org/gated")
    hub.fault("GET /cdn/", status=401, times=9)
    assert "no access (HTTP 401)" in refused("hf:org/m")
    hub.seed("org/secret", {NAME: DATA}, private=True)
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "set HF_TOKEN or run `hf auth login`" in refused("hf:org/secret")
    assert "set MODELSCOPE_API_TOKEN or run `ms-hub login`" in refused("ms:org/secret")


def test_a_revision_that_goes_away_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    client = client_of("hf")
    job = job_of(client, "hf", tmp_path)
    del hub.repos["org/m"].commits[hub.repos["org/m"].branches["main"]]
    with pytest.raises(HubError, match="no such revision"):
        fetch(client, job, DaemonPool(2))


def test_offline_sends_nothing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        list_repo(client_of("hf"), parse_spec("hf:org/m"))
    assert hub.log == []


def test_no_network_is_told_soon(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    with pytest.raises(TransferError, match=r"no-such-host.invalid: the host name does not resolve"):
        list_repo(client_of("hf"), parse_spec("hf:org/m"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransferError, match="connection refused after 5 attempts"):
        list_repo(client_of("hf"), parse_spec("hf:org/m"))


@pytest.mark.parametrize("path", ["../evil", "/etc/x", "a/../../b", "a//b", ""])
def test_a_listing_cannot_name_paths_outside(hub: HubServer, path: str) -> None:
    hub.seed("org/m", {path: b"x"})
    with pytest.raises(HubError, match="expected a relative path"):
        list_repo(client_of("hf"), parse_spec("hf:org/m"))


@pytest.mark.parametrize("text", ["hf:", "hf:name", "xx:a/b", "hf:a/b/c", "hf:a/..", "ms:a/b@"])
def test_malformed_specs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected hf:ORG/NAME"):
        parse_spec(text)


def test_the_start_of_a_file_is_read_from_a_server_without_ranges(hub: HubServer) -> None:
    client = client_of("hf")
    url = file_url(client.endpoint.url, list_repo(client, parse_spec("hf:org/m")).pinned, NAME)
    hub.fault("GET /cdn/", ignore_range=True, times=2)
    assert fetch_range(client, url, 0, 1000, len(DATA), "x") == DATA[:1000]
    with pytest.raises(TransferError, match="the whole file"):
        fetch_range(client, url, 1000, 10, len(DATA), "x")


def test_the_disk_is_checked_before_the_first_byte(hub: HubServer, tmp_path: Path) -> None:
    client = client_of("hf")
    job = job_of(client, "hf", tmp_path)
    job = replace(job, file=replace(job.file, size=1 << 60), block=1 << 58)
    hub.log.clear()
    with pytest.raises(OSError, match=r"1,152,921,504,606,846,976 bytes are needed in .*, the disk has [\d,]+ free"):
        fetch(client, job, DaemonPool(2))
    assert hub.log == []


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from mmquant.convert.hub.fetch import Job, fetch
from mmquant.convert.hub.http import Client, Retry
from mmquant.convert.hub.hubs import endpoint_of, file_url, list_repo, parse_spec
from mmquant.convert.hub.prefetch import DaemonPool
client = Client(endpoint_of("hf"), Retry(attempts=2, base=0.01, stall=5))
listing = list_repo(client, parse_spec("hf:org/m"))
file = listing.files[{name!r}]
url = file_url(client.endpoint.url, listing.pinned, file.path)
job = Job(url, file, Path({folder!r}) / file.path, file.path, {block})
try:
    fetch(client, job, DaemonPool(3))
except OSError as error:
    print(error.errno, error)
"""


def child(folder: Path, block: int = BLOCK) -> list[str]:
    code = CHILD.format(tests=str(ROOT / "tests"), name=NAME, folder=str(folder), block=block)
    return [sys.executable, "-c", code]


def test_killed_fetches_are_continued_to_identical_bytes(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.seed("org/m", {NAME: DATA})
        environment = {**os.environ, **hub.environment()}
        record = tmp_path / (NAME + ".part.json")
        for more, blocks in ((2, 2), (4, 6)):
            hub.hold("GET /cdn/", after=more)
            process = subprocess.Popen(child(tmp_path), env=environment)
            until(process, lambda n=blocks: record.exists() and len(json.loads(record.read_bytes())["done"]) == n)
            kill(process)
            hub.let_go()
        assert not (tmp_path / NAME).exists()
        done = json.loads(record.read_bytes())["done"]
        before = hub.sent
        subprocess.run(child(tmp_path), env=environment, check=True)
        assert (tmp_path / NAME).read_bytes() == DATA
        assert leftovers(tmp_path) == []
        assert hub.sent - before <= len(DATA) - (len(done) - 1) * BLOCK


def test_a_torn_or_foreign_record_is_not_trusted(hub: HubServer, tmp_path: Path) -> None:
    part, record = tmp_path / (NAME + ".part"), tmp_path / (NAME + ".part.json")
    good = {"size": len(DATA), "digest": hashlib.sha256(DATA).hexdigest(), "block": BLOCK, "done": [0, 1, 2]}
    for text in (
        '{"size":',
        "[]",
        "null",
        json.dumps({**good, "digest": "0" * 64}),
        json.dumps({**good, "done": ["x"]}),
    ):
        part.write_bytes(bytes(len(DATA)))
        record.write_text(text)
        hub.log.clear()
        assert get("hf", tmp_path).read_bytes() == DATA
        assert len(hub.calls("GET /cdn/")) == len(range(0, len(DATA), BLOCK))
        (tmp_path / NAME).unlink()
    part.write_bytes(bytes(100))  # shorter than recorded
    record.write_text(json.dumps(good))
    assert get("hf", tmp_path).read_bytes() == DATA


def test_a_full_disk_is_one_line_and_the_fetch_goes_on_afterwards(hub: HubServer, tmp_path: Path) -> None:
    """On a real file system of 400 KiB that another process fills after the check."""
    code = child(tmp_path)[2].replace("from mmquant.convert.hub.fetch import Job, fetch", FILL.format(str(tmp_path)))
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no user namespaces here")
    shell = f'mount -t tmpfs -o size=400k none {tmp_path} && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell], env={**os.environ, "CODE": code}, capture_output=True, text=True
    )
    assert done.stdout.startswith("28 "), done.stdout + done.stderr
    assert "is full, 300,007 bytes are needed for this file" in done.stdout
    assert len(done.stdout.splitlines()) == 1


# Another process takes the space between the check and the writing.
FILL = """
import mmquant.convert.hub.fetch as hub_fetch
from mmquant.convert.hub.fetch import Job, fetch
begin = hub_fetch._begin
def begin_then_fill(job):
    done = begin(job)
    Path({0!r}, "other").write_bytes(bytes(200_000))
    return done
hub_fetch._begin = begin_then_fill
"""


def test_the_endpoint_and_token_are_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://one.example/")
    monkeypatch.setenv("HF_TOKEN", "hf_a")
    assert endpoint_of("hf") == Endpoint(HUBS["hf"], "http://one.example", "hf_a")
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert endpoint_of("hf").url == "https://huggingface.co"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "two.example")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-b")
    assert endpoint_of("ms") == Endpoint(HUBS["ms"], "https://two.example", "ms-b")


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An https server that sends DATA 16 times over, with a certificate of its own that requests is told to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = (
        made.serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    )
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "server.pem").write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "server.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with socket.create_server(("localhost", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with context.wrap_socket(raw, server_side=True) as connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 * len(DATA)) + 16 * DATA)
                connection.recv(1)  # until the client leaves

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"https://localhost:{listener.getsockname()[1]}"
        thread.join(5)


def test_records_of_tls_are_read_together(secure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read a record, 16 KiB, takes five times the time of the processor."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    client = Client(Endpoint(HUBS["hf"], secure), Retry(stall=30))
    pieces = list(body(client, client.once("GET", secure, {}), 16 * len(DATA)))
    assert b"".join(pieces) == 16 * DATA
    assert len(pieces) < 16 * len(DATA) / (16 << 10) / 2
