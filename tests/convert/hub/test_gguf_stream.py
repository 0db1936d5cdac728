"""A GGUF model of a hub during a pass over its layers: the values of a local file, a layer or two on the disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.hub_server import HubServer
from helpers.tiny import write_tiny
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.gguf.writer import TensorInfo, header, padded
from mmquant.convert.hub.gguf_stream import StreamedGguf, stream_gguf_repository
from mmquant.convert.hub.http import Retry, TransferError
from mmquant.convert.hub.store import FetchOptions
from mmquant.convert.open import demo_folder, open_native
from mmquant.convert.source import Source
from mmquant.errors import InputError
from mmquant.runs.gguf_job import write_gguf

LAYERS = 4
OPTIONS = FetchOptions(retry=Retry(2, 0.01, 0.02, 20.0), block=50_000, connections=3)
ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "as written": lambda names: names,
    "head first": lambda names: [*names[-2:], *names[:-2]],
    "layers backwards": lambda names: names[::-1],
    "shuffled": lambda names: sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    model = write_tiny(folder / "model", shards=1, vocab_size=2048, num_hidden_layers=LAYERS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((demo_folder() / name).read_bytes())
    write_gguf(open_native(model), GgufVariant(find_mix("Q8_0"), "tiny-Q8_0", False), folder / "out")
    return folder / "out" / "tiny-Q8_0.gguf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        yield server.use(monkeypatch, tmp_path)


def reordered(path: Path, order: Callable[[list[str]], list[str]]) -> bytes:
    """The file with its tensors' values in another order."""
    file = GgufSource(path).files[0]
    found = [TensorInfo(t.name, t.shape, t.kind.name) for t in file.tensors.values()]
    keys_end = file.header_bytes - sum(24 + len(t.name) + 8 * len(t.shape) for t in found)
    count = int.from_bytes(file.data[16:24].tobytes(), "little")
    by_name = {t.name: t for t in found}
    tensors = tuple(by_name[name] for name in order(list(by_name)))
    data = bytearray(header(file.data[24:keys_end].tobytes(), count, tensors))
    for tensor in tensors:
        data += file.raw(file.tensors[tensor.name]).tobytes().ljust(padded(tensor.bytes), b"\0")
    return bytes(data)


def opened(**changes: object) -> StreamedGguf:
    source = stream_gguf_repository("hf:org/m", None, replace(OPTIONS, **changes))
    assert isinstance(source, StreamedGguf)
    return source


def layer_of(source: Source, layer: int) -> list[torch.Tensor]:
    names = source.geometry.names
    projections = ("gate", "up", "down")
    experts = range(source.geometry.experts)
    found = [source.read_experts(layer, one, experts, "cpu", torch.float32) for one in projections]
    return [source.read(names.attention(layer, "q_proj") + ".weight"), *found]


def ends_of(source: Source) -> list[torch.Tensor]:
    return [source.read(source.geometry.names.final_norm), source.read(source.geometry.names.head)]


def passed(source: Source) -> list[torch.Tensor]:
    """What a pass reads, in its order; the head last."""
    found = [source.read(source.geometry.names.embed)]
    for layer in range(LAYERS):
        found += layer_of(source, layer)
    return found + ends_of(source)


@pytest.mark.parametrize("order", ORDERS)
def test_a_pass_reads_a_local_files_values(hub: HubServer, file: Path, tmp_path: Path, order: str) -> None:
    data = reordered(file, ORDERS[order])
    local_path = tmp_path / "local.gguf"
    local_path.write_bytes(data)
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    local, source, most = GgufSource(local_path), opened(), 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in (tmp_path / "cache").rglob("step-*.gguf")))

    hub.watch = look
    source.validate()
    assert source.fingerprint == local.fingerprint
    assert all(map(torch.equal, passed(source), passed(local)))
    assert most <= source.course.peak()
    if order == "as written":
        layer = sum(p.stop - p.start for p in source.course.pieces if p.step == 1)
        assert source.course.peak() < 2.5 * layer + sum(p.stop - p.start for p in source.course.pieces if p.step == 0)
    source.close(finished=True)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.parametrize("at", [0.3, 0.999])
def test_wrong_bytes_reach_no_score(hub: HubServer, file: Path, at: float) -> None:
    """A layer's wrong byte may be read; the head, without which nothing is scored, is not given out."""
    data = bytearray(file.read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    hub.seed("org/m", {"tiny-Q8_0.gguf": bytes(data)})
    data[int(at * len(data))] ^= 1
    hub.objects[digest] = bytes(data)
    source = opened()
    with pytest.raises(TransferError, match=r"the bytes hash to .*, the listing says"):
        passed(source)
    source.close()


def test_a_head_that_comes_first_waits_for_the_last_byte(hub: HubServer, file: Path) -> None:
    data = reordered(file, ORDERS["head first"])
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    hub.objects[hashlib.sha256(data).hexdigest()] = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    source = opened()
    source.read(source.geometry.names.embed)
    with pytest.raises(TransferError, match="the listing says"):
        ends_of(source)
    source.close()


def test_one_layer_is_fetched_ahead(hub: HubServer, file: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    source = opened()
    layer_of(source, 0)
    flow, (number, end) = source.flow, source.course.end(2)
    assert flow.wants(number, end - 1)
    assert not flow.wants(number, end)
    source.close()


def test_the_embeddings_are_fetched_once(hub: HubServer, file: Path) -> None:
    """They serve as a tied head at the end."""
    data = reordered(file, lambda names: [name for name in names if name != "output.weight"])
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    source = opened()
    hub.log.clear()
    passed(source)
    starts = [int(re.findall(r"\d+", call["range"])[0]) for call in hub.calls("GET /cdn/")]
    assert sorted(starts) == list(range(0, len(data), OPTIONS.block))
    source.close()


def test_a_tied_head_waits_for_the_digest_too(hub: HubServer, file: Path) -> None:
    names = list(GgufSource(file).files[0].tensors)
    data = reordered(file, lambda _: [name for name in names if name != "output.weight"])
    digest = hashlib.sha256(data).hexdigest()
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    hub.objects[digest] = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    source = opened()
    with pytest.raises(TransferError, match="the listing says"):
        passed(source)
    source.close()


def test_a_header_that_changed_is_refused(hub: HubServer, file: Path) -> None:
    data = file.read_bytes()
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    source = opened()
    at = data.index(b"general.name") + 20
    hub.objects[hashlib.sha256(data).hexdigest()] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(TransferError, match="its header differs"):
        layer_of(source, 0)
    source.close()


def test_a_second_pass_reads_the_same_bytes_or_none(hub: HubServer, file: Path) -> None:
    data = file.read_bytes()
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    local, source = GgufSource(file), opened()
    for layer in (0, 1, 2, 0, 1, 3):
        assert all(map(torch.equal, layer_of(source, layer), layer_of(local, layer)))
    tensor = next(piece for piece in source.course.pieces if piece.step == 2)
    hub.objects[hashlib.sha256(data).hexdigest()] = data[: tensor.start] + b"\x55" * 99 + data[tensor.start + 99 :]
    with pytest.raises(TransferError, match="other bytes of step 2"):
        layer_of(source, 1)
    source.close()


def test_a_run_that_goes_on_at_a_layer_keeps_none_before_it(hub: HubServer, file: Path, tmp_path: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    local, source = GgufSource(file), opened()
    assert all(map(torch.equal, layer_of(source, 2), layer_of(local, 2)))
    assert not [n for n in (1, 2) if list((tmp_path / "cache").rglob(f"step-{n}.gguf"))]
    assert all(map(torch.equal, ends_of(source), ends_of(local)))
    source.close()


def test_a_connection_that_breaks_is_taken_up(hub: HubServer, file: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    local, source = GgufSource(file), opened()
    hub.fault("GET /cdn/", times=2, cut=1000)
    hub.fault("GET /cdn/", times=1, status=503)
    assert all(map(torch.equal, passed(source), passed(local)))
    source.close()


def test_a_network_that_is_gone_ends_it(hub: HubServer, file: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    source = opened()
    hub.fault("GET /cdn/", times=1 << 30, cut=1000)
    with pytest.raises(TransferError, match="run the command again"):
        layer_of(source, 0)
    source.close()


def test_limits_are_held_against_what_lies_on_the_disk(hub: HubServer, file: Path) -> None:
    data = reordered(file, ORDERS["layers backwards"])
    hub.seed("org/m", {"tiny-Q8_0.gguf": data})
    with pytest.raises(InputError, match=r"--max-disk 100,000: hf:org/m@\w+:Q8_0 needs [\d,]+ bytes at a time"):
        opened(max_disk=100_000)
    opened(max_disk=len(data)).close()


def test_what_a_killed_run_left_goes(hub: HubServer, file: Path, tmp_path: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    source = opened()
    left = source.store.folder / "steps" / "step-3.gguf"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert all(map(torch.equal, layer_of(source, 2), layer_of(GgufSource(file), 2)))
    source.close(finished=True)
    assert not list((tmp_path / "cache").rglob("step-*"))


def test_whole_files_are_kept_when_asked_for(hub: HubServer, file: Path) -> None:
    hub.seed("org/m", {"tiny-Q8_0.gguf": file.read_bytes()})
    kept = stream_gguf_repository("hf:org/m", None, replace(OPTIONS, keep_shards=True))
    assert all(map(torch.equal, ends_of(kept), ends_of(GgufSource(file))))
    kept.close()
    assert not isinstance(stream_gguf_repository("hf:org/m", None, OPTIONS), StreamedGguf), "it is here already"
