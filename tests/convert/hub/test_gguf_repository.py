"""A GGUF repository by type: parts are fetched, verified, read as local files, and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.hub_server import HubServer
from helpers.tiny import write_tiny
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.hub.gguf_repository import choose_model
from mmquant.convert.open import demo_folder, open_native, open_source
from mmquant.errors import InputError
from mmquant.runs.doctor import doctor
from mmquant.runs.fit import fit
from mmquant.runs.gguf_job import write_gguf
from mmquant.runs.options_use import DoctorOptions, FitOptions

CARD = b"---\nbase_model: org/base\n---\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Q8_0 in several parts and an F16 in one."""
    folder = tmp_path_factory.mktemp("gguf")
    model = write_tiny(folder / "model", shards=1, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((demo_folder() / name).read_bytes())
    for kind, limit in (("Q8_0", 800_000), ("F16", 10**9)):
        variant = GgufVariant(find_mix(kind), f"tiny-{kind}", False, part_bytes=limit)
        write_gguf(open_native(model), variant, folder / "out" / kind)
    return folder / "out"


@pytest.fixture
def hub(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        found = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*.gguf")}
        server.seed("org/tiny-GGUF", {**found, "README.md": CARD})
        server.seed("org/one-GGUF", {"tiny-F16.gguf": found["F16/tiny-F16.gguf"]})
        yield server


def test_a_type_picks_its_parts(hub: HubServer, files: Path, tmp_path: Path) -> None:
    local = GgufSource(files / "Q8_0")
    assert len(local.files) > 1
    source = open_source("hf:org/tiny-GGUF:q8_0")
    source.validate()
    assert source.fingerprint == local.fingerprint
    assert source.label.startswith("hf:org/tiny-GGUF@")
    assert source.label.endswith(":Q8_0")
    assert source.origin.repo == "org/tiny-GGUF"
    assert torch.equal(source.read("model.norm.weight"), local.read("model.norm.weight"))
    assert source.census() == local.census()
    source.close(finished=True)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_repository_with_one_model_needs_no_type(hub: HubServer) -> None:
    assert open_source("hf:org/one-GGUF").label.endswith(":F16")


def test_several_types_and_unknown_ones_are_listed(hub: HubServer) -> None:
    for spec in ("hf:org/tiny-GGUF", "hf:org/tiny-GGUF:Q4_K_M"):
        with pytest.raises(InputError, match="F16, Q8_0"):
            open_source(spec)


def test_a_gguf_repository_is_no_source(hub: HubServer) -> None:
    with pytest.raises(InputError, match=r"GGUF repository.*quantize hf:org/base instead"):
        open_native("hf:org/tiny-GGUF")
    with pytest.raises(InputError, match="GGUF type"):
        open_native("hf:org/tiny-GGUF:Q8_0")


def test_doctor_reads_it_and_fixes_nothing_there(hub: HubServer, files: Path) -> None:
    there, here = doctor("hf:org/tiny-GGUF:F16"), doctor(files / "F16" / "tiny-F16.gguf")
    assert there.findings == here.findings
    with pytest.raises(InputError, match="--fix"):
        doctor("hf:org/tiny-GGUF:F16", DoctorOptions(fix=True, text=("default",)))


def test_missing_parts() -> None:
    with pytest.raises(InputError, match="1 of 2 parts"):
        choose_model({"a/m-Q8_0-00001-of-00002.gguf": 1}, "Q8_0", "hf:o/n")


def test_what_fits_is_said_of_headers_alone(
    hub: HubServer, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmquant.convert.hub.gguf_headers.PIECE", 1 << 14)
    chosen = FitOptions(target="24GB+96GB", context=512)
    there, here = fit("hf:org/tiny-GGUF:q8_0", chosen), fit(files / "Q8_0", chosen)
    assert there.geometry == here.geometry
    assert there.fits[0].weights == here.fits[0].weights
    lines = {command.engine: command.line for command in there.commands(there.fits[0])}
    assert "llama-server -hf org/tiny-GGUF:Q8_0 -c 512" in lines["llama.cpp"]
    assert "ollama" not in lines, "it pulls no split files"
    one = fit("hf:org/one-GGUF", chosen)
    assert "ollama run hf.co/org/one-GGUF:F16" in [command.line for command in one.commands(one.fits[0])]
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    with pytest.raises(InputError, match="F16, Q8_0"):
        fit("hf:org/tiny-GGUF:Q4_K_M", chosen)


def test_a_damaged_header_of_a_hub_is_one_line(hub: HubServer, files: Path) -> None:
    whole = (files / "F16" / "tiny-F16.gguf").read_bytes()
    for number, data in enumerate((b"nothing", whole[:2000], whole[:4] + b"\xff" * 200, b"")):
        hub.seed(f"org/bad-{number}", {"tiny-F16.gguf": data})
        with pytest.raises(InputError) as error:
            fit(f"hf:org/bad-{number}:F16", FitOptions(target="24GB+96GB"))
        assert "tiny-F16.gguf" in str(error.value)
