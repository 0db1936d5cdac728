"""`mmquant eval` of repositories: streamed shard by shard as the reference is, verified, and deleted on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from helpers.ct_reader import tensors_of
from helpers.hub_server import HubServer
from helpers.tiny import write_tiny
from mmquant.commands.cli import cli
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.open import demo_folder, open_native
from mmquant.errors import InputError, MmquantError
from mmquant.runs.gguf_job import write_gguf

SHARDS = 6
FEW = ("--windows", "2", "--context", "32", "--json")


def mmquant(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def message(result: Result) -> str:
    assert isinstance(result.exception, MmquantError | OSError), result.exception
    text = str(result.exception)
    assert "\n" not in text
    assert len(text) < 600
    return text


def split(folder: Path) -> None:
    """The one shard of a folder cut into `SHARDS`, in the order of its tensors' names."""
    tensors = tensors_of(folder)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    names, index = sorted(tensors), dict[str, str]()
    for place in range(SHARDS):
        shard = f"model-{place + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[place * len(names) // SHARDS : (place + 1) * len(names) // SHARDS]
        save_file({name: tensors[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an INT4 folder of several shards, and GGUF files of two types, one of them in parts."""
    root = tmp_path_factory.mktemp("hub")
    model = write_tiny(root / "model", shards=SHARDS, vocab_size=2048, intermediate_size=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((demo_folder() / name).read_bytes())
    done = mmquant("int4", "--model", model, "--method", "rtn", "--group-size", "32", "--out", root / "int4")
    assert done.exit_code == 0, (done.exception, done.output)
    (root / "int4" / "mmquant.fit.json").unlink()
    split(root / "int4")
    for kind, limit in (("Q8_0", 800_000), ("F16", 10**9)):
        variant = GgufVariant(find_mix(kind), f"tiny-{kind}", False, part_bytes=limit)
        write_gguf(open_native(model), variant, root / "gguf" / kind)
    return root


@pytest.fixture
def hub(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        for repository, folder in (("org/tiny", "model"), ("org/tiny-INT4", "int4")):
            server.seed(repository, {p.name: p.read_bytes() for p in (files / folder).iterdir() if p.is_file()})
        gguf = files / "gguf"
        server.seed("org/tiny-GGUF", {p.relative_to(gguf).as_posix(): p.read_bytes() for p in gguf.rglob("*.gguf")})
        yield server


def scores(*arguments: str | Path) -> list[dict[str, Any]]:
    done = mmquant("eval", *arguments, *FEW)
    assert done.exit_code == 0, (done.exception, done.output)
    found = json.loads(done.stdout)["candidates"]
    return [{key: one[key] for key in ("bytes", "ppl", "kld", "top1")} for one in found]


def weights_in(cache: Path) -> list[str]:
    """Shards and GGUF files on the disk, half fetched ones too."""
    found = (p for p in cache.rglob("*") if p.is_file() and ".json" not in p.name)
    return [p.name.removesuffix(".part") for p in found if ".safetensors" in p.name or ".gguf" in p.name]


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_repositories_score_as_folders_do(hub: HubServer, files: Path, tmp_path: Path, source: str) -> None:
    there = scores(
        f"{source}:org/tiny-INT4", f"{source}:org/tiny-GGUF:q8_0", f"{source}:org/tiny-GGUF:F16",
        "--reference", f"{source}:org/tiny",
    )  # fmt: skip
    here = scores(
        files / "int4", next((files / "gguf" / "Q8_0").glob("*00001*")), next((files / "gguf" / "F16").glob("*.gguf")),
        "--reference", files / "model",
    )  # fmt: skip
    assert there == here
    assert there[0]["kld"]["mean"] > there[1]["kld"]["mean"] > 0
    assert weights_in(tmp_path / "cache") == []


def test_a_limit_below_what_a_layer_needs_says_so(hub: HubServer) -> None:
    done = mmquant("eval", "hf:org/tiny-INT4", "--reference", "hf:org/tiny", "--max-shards", "1", *FEW)
    assert isinstance(done.exception, InputError)
    assert "--max-shards 1, expected at least 2" in message(done)


@pytest.mark.parametrize("limit", [4, 5])
def test_few_shards_of_each_lie_on_the_disk(hub: HubServer, tmp_path: Path, limit: int) -> None:
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, len(set(weights_in(tmp_path / "cache"))))

    hub.watch = look
    scores("hf:org/tiny-INT4", "--reference", "hf:org/tiny", "--max-shards", str(limit))
    assert 0 < most <= 2 * limit  # of the reference and of the candidate
    assert weights_in(tmp_path / "cache") == []


@pytest.mark.parametrize("spec", ["hf:org/tiny-GGUF:Q4_K_M", "hf:org/tiny-GGUF"])
def test_a_type_that_is_not_there_lists_those_that_are(hub: HubServer, spec: str) -> None:
    done = mmquant("eval", spec, "--reference", "hf:org/tiny", *FEW)
    assert isinstance(done.exception, InputError)
    assert "F16, Q8_0" in message(done)
    assert hub.calls(r"GET .*/resolve/.*gguf") == []


def test_a_type_of_a_folder_repository_is_one_line(hub: HubServer) -> None:
    done = mmquant("eval", "hf:org/tiny-INT4:Q8_0", "--reference", "hf:org/tiny", *FEW)
    assert isinstance(done.exception, InputError)
    assert "org/tiny-INT4" in message(done)


def test_a_shard_lost_in_between_is_named(hub: HubServer) -> None:
    """Its header came; then the hub has it no more."""
    lost = f"model-00004-of-{SHARDS:05}.safetensors"
    hub.fault(rf"GET .*tiny-INT4.*{lost}", times=2)  # the headers, by ranges
    hub.fault(rf"GET .*tiny-INT4.*{lost}", times=1 << 30, status=404)
    done = mmquant("eval", "hf:org/tiny-INT4", "--reference", "hf:org/tiny", *FEW)
    assert done.exit_code != 0
    assert lost in message(done)


def test_a_wrong_digest_is_never_scored(hub: HubServer, files: Path) -> None:
    """A byte of the values is wrong each time, and none of the header."""
    wrong = f"model-00005-of-{SHARDS:05}.safetensors"
    data = (files / "int4" / wrong).read_bytes()
    hub.fault(f"GET /cdn/.*{hashlib.sha256(data).hexdigest()}", times=1 << 30, flip=len(data) - 9)
    done = mmquant("eval", "hf:org/tiny-INT4", "--reference", "hf:org/tiny", *FEW)
    assert done.exit_code != 0
    assert wrong in message(done)
    assert "the listing says" in message(done)
