"""`mmquant run` on several ranks (gloo, processes of this machine)."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from gguf import GGUFReader

from helpers.calibration_cases import ranks
from helpers.hub_server import HubServer
from helpers.run_cases import artifacts, digests, model, recipe, serve
from mmquant.convert.hub.store import FetchOptions
from mmquant.runs.int4 import quantize_int4
from mmquant.runs.journal import read_journal
from mmquant.runs.run import run

VARIANTS = """
  fp8: {command: fp8}
  int4-g32: {command: int4, group_size: 32}
  statistics: {command: calibrate, moments: full}
"""
MORE = """
  int4-g64: {command: int4, group_size: 64}
  nvfp4: {command: nvfp4}
  quantized: {command: int4, group_size: 32, propagate: quantized}
  Q4_K_M: {command: gguf, type: Q4_K_M}
  Q3_K_S: {command: gguf, type: Q3_K_S}
  fast: {command: gguf, type: Q2_K, effort: fast}
  rtn: {command: gguf, type: Q8_0}
"""
CHECK = "check: {windows: 3, context: 32}\n"


def test_two_ranks_make_and_score_every_variant_in_one_pass(tmp_path: Path) -> None:
    """The bytes are those of a run for each variant on as many ranks; what sums nothing has one process's."""
    wanted = recipe(model(tmp_path / "model"), VARIANTS, CHECK)

    def work() -> None:
        made = run(wanted, tmp_path / "out", device="cpu")
        assert bool(made.table) == bool(made.text)

    ranks(2, work)
    found = artifacts(tmp_path / "out")
    alone = replace(wanted, variants=wanted.variants[:1], check=None)
    run(alone, tmp_path / "fp8", device="cpu")
    fp8 = {name: digest for name, digest in artifacts(tmp_path / "fp8").items() if "fit" not in name.lower()}
    assert fp8.items() <= found.items()
    int4 = wanted.variants[1].options
    ranks(2, lambda: quantize_int4(wanted.model, tmp_path / "int4", int4, device="cpu"))
    shards = {f"int4-g32/{name}": digest for name, digest in digests(tmp_path / "int4").items() if "model-" in name}
    assert shards
    assert shards.items() <= found.items()
    journal = read_journal(tmp_path / "out")
    assert journal is not None
    assert journal.state == "finished"
    assert all("scores" in journal.artifacts[name].facts for name in ("fp8", "int4-g32"))
    assert not list((tmp_path / "out").rglob(".hidden-*"))


@pytest.mark.slow
def test_every_kind_of_variant_is_made_from_a_hub_that_one_rank_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank fetches each shard once, and reads for the others; artifacts and scores are a local model's."""
    source = model(tmp_path / "m")  # a GGUF file is called by it
    local = recipe(source, VARIANTS + MORE, CHECK)
    ranks(2, lambda: run(local, tmp_path / "local", device="cpu"))
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        wanted = recipe(serve(hub, source), VARIANTS + MORE, CHECK)
        fetch = FetchOptions(transport="http")
        ranks(2, lambda: run(wanted, tmp_path / "hub", device="cpu", fetch=fetch))
        calls = [(call["line"], str(call["range"])) for call in hub.calls(r"^GET /cdn/") if call["range"]]
    for shard in {line for line, _ in calls}:
        spans = [[int(word) for word in re.findall(r"\d+", asked)] for line, asked in calls if line == shard]
        whole = [end - start + 1 for start, end in spans if end == max(end for _, end in spans)]
        assert len(whole) == 1, spans  # its bytes once; besides, its header and what the fingerprint samples
    found = [tensors_of(tmp_path / place) for place in ("hub", "local")]
    assert found[0]
    assert found[0] == found[1]
    journals = [read_journal(tmp_path / place) for place in ("hub", "local")]
    scores = [journal.artifacts["Q4_K_M"].facts["scores"] for journal in journals if journal is not None]
    assert scores[0] == scores[1]


def tensors_of(folder: Path) -> dict[str, str]:
    """Digests of weights: of shards as they are, of a GGUF behind its keys, which name where the model came from."""
    found = {n: d for n, d in artifacts(folder).items() if n.endswith(".safetensors")}
    for path in sorted(folder.rglob("*.gguf")):
        tensors = GGUFReader(path).tensors
        found |= {f"{path.name} {t.name}": sha256(t.data.tobytes()).hexdigest() for t in tensors}
    return found
