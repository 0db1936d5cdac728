"""GGUF from stored statistics and from an imatrix: which moments round which tensor, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.calibration_cases import corpus, options
from helpers.tiny import write_tiny
from mmquant.calibration.gguf.moments import PRIOR
from mmquant.calibration.gguf.run_stored import DIAGONAL_PRIOR, Stored, encode_layer, open_stored
from mmquant.calibration.gguf.solve import METHODS, Report
from mmquant.calibration.statistics.imatrix_export import imatrix_of
from mmquant.calibration.statistics.run import calibrate_into
from mmquant.calibration.statistics.store import StoredStatistics, open_statistics
from mmquant.commands.gguf import command
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.gguf.imatrix import Importance, read_imatrix, write_imatrix
from mmquant.convert.open import demo_folder, open_native
from mmquant.convert.source import read_layer
from mmquant.errors import InputError
from mmquant.quantize.ggml.codec import decode, encode
from mmquant.quantize.ggml.types import GGMLType
from mmquant.quantize.moments import shrunk, shrunk_diagonal

Q3_K, Q8_0 = GGMLType.Q3_K, GGMLType.Q8_0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 3}
    folder = write_tiny(tmp_path_factory.mktemp("model"), vocab_size=2048, num_attention_heads=8, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder)
    return open_native(folder)


@pytest.fixture(scope="module")
def folder(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "s"
    assert len(list(calibrate_into(source, corpus(30, 40), out, options()))) == 2
    return out


@pytest.fixture(scope="module")
def imatrix(folder: Path) -> Path:
    path = folder.parent / "imatrix.gguf"
    write_imatrix(path, imatrix_of(open_statistics(folder)))
    return path


def decoded(data: np.ndarray, kind: GGMLType) -> torch.Tensor:
    experts, rows, _ = data.shape
    return decode(torch.from_numpy(data).flatten(0, 1), kind, 256).view(experts, rows, 256)


def test_moments_give_less_loss_than_their_diagonals(source: Checkpoint, folder: Path, imatrix: Path) -> None:
    stored = open_stored(folder, source, "default")
    weights, losses = read_layer(source, 1).up, []
    moments = shrunk(stored.moments(1, source.geometry)["ffn_up_exps"], PRIOR)
    for known in (stored, open_stored(imatrix, source, "fast")):
        error = (
            decoded(encode_layer(source, known, 1, {"ffn_up_exps": Q3_K}, "cpu", Report())["ffn_up_exps"], Q3_K)
            - weights
        )
        losses.append(((error @ moments) * error).sum((1, 2)))
    assert (losses[0] < 0.8 * losses[1]).all()


def test_an_imatrix_weighs_the_search_of_each_expert(source: Checkpoint, imatrix: Path) -> None:
    stored = open_stored(imatrix, source, "fast")
    found = encode_layer(source, stored, 0, {"ffn_down_exps": Q3_K}, "cpu", Report())["ffn_down_exps"]
    importance = shrunk_diagonal(stored.moments(0, source.geometry)["ffn_down_exps"], DIAGONAL_PRIOR)
    for expert, weight in enumerate(read_layer(source, 0).down):
        assert np.array_equal(found[expert], encode(weight, Q3_K, importance[expert]).numpy())
    plain = torch.stack([encode(weight, Q3_K) for weight in read_layer(source, 0).down]).numpy()
    assert not np.array_equal(found, plain)


def test_an_expert_that_overflows_is_rescaled(
    source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = open_stored(folder, source, "fast")
    known = stored.moments(1, source.geometry)
    loud = replace(known["ffn_down_exps"], sum32=torch.tensor([1.0, 200_000.0, 3.0]))
    monkeypatch.setattr(Stored, "moments", lambda *_: known | {"ffn_down_exps": loud})
    report = Report()
    made = encode_layer(source, stored, 1, {"ffn_up_exps": Q8_0, "ffn_down_exps": Q8_0}, "cpu", report)
    assert report.rescaled == {(1, 1): 4}
    factor = torch.tensor([1.0, 16.0, 1.0]).view(-1, 1, 1)  # 200,000 / 16 < 65504 / 4
    weights = read_layer(source, 1)
    for name, written, weight in (("ffn_up_exps", factor, weights.up), ("ffn_down_exps", 1 / factor, weights.down)):
        assert torch.allclose(decoded(made[name], Q8_0) * written, weight, atol=0.05 * float(weight.std()))


def test_the_command_writes_what_it_was_given(source: Checkpoint, folder: Path, imatrix: Path, tmp_path: Path) -> None:
    model = ["--model", source.label, "--type", "Q3_K_S", "--max-part-size", "1GB"]
    for name, given in (("full", ["--statistics", str(folder)]), ("fast", ["--statistics", str(imatrix)])):
        effort = ["--effort", "fast"] if name == "fast" else []
        result = CliRunner().invoke(command, [*model, "--out", str(tmp_path / name), *given, *effort])
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / name).glob("*.gguf")
        reader = gguf.GGUFReader(file)
        entry = reader.get_field("quantize.imatrix.file")
        assert entry is not None
        assert entry.contents() == ("mmquant" if name == "full" else "imatrix.gguf")
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types["blk.1.ffn_down_exps.weight"] == "Q3_K"
        assert types["output.weight"] == "Q6_K"


def test_what_decides_the_bytes_is_in_the_run(source: Checkpoint, folder: Path, imatrix: Path) -> None:
    """Effort, text, and which imatrix: a run of one must not be continued as a run of the other."""
    known = [open_stored(folder, source, effort) for effort in ("default", "fast")]
    statistics = known[0].known
    assert isinstance(statistics, StoredStatistics)
    other = replace(statistics, identity={**statistics.identity, "corpus": "another"})
    known += [replace(known[0], known=other), open_stored(imatrix, source, "fast")]
    runs = [stored.run() for stored in known]
    assert all(a != b for i, a in enumerate(runs) for b in runs[:i])
    assert known[3].method == METHODS["fast"]
    assert [stored.method.correct for stored in known[:2]] == [False, False], "stored sums know no second stream"


def test_statistics_that_do_not_serve_are_refused(
    source: Checkpoint, folder: Path, imatrix: Path, tmp_path: Path
) -> None:
    other = open_native(write_tiny(tmp_path / "other", vocab_size=96, num_hidden_layers=2))
    with pytest.raises(ValueError, match="statistics of another checkpoint"):
        open_stored(folder, other, "default")
    with pytest.raises(ValueError, match=r"imatrix\.gguf: an imatrix holds diagonals"):
        open_stored(imatrix, source, "default")
    with pytest.raises(ValueError, match=r"attn_q: moments of 1 matrices with 256 inputs, expected 1 with 192"):
        open_stored(imatrix, other, "fast")
    whole = read_imatrix(imatrix)
    partial = tmp_path / "partial.imatrix"
    lost = ("blk.1.ffn_down_exps.weight", "blk.1.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")
    kept = {name: value for name, value in whole.weights.items() if name not in lost}
    write_imatrix(partial, replace(whole, weights=kept))
    with pytest.raises(InputError, match=r"partial\.imatrix: blk\.1\.ffn_down_exps\.weight is missing \(1 of 14 "):
        open_stored(partial, source, "fast")
    with pytest.raises(InputError, match=r"a file, expected the folder of `mmquant calibrate --out`"):
        open_statistics(imatrix)
    result = CliRunner().invoke(command, ["--model", "demo", "--out", "x", "--statistics", "y", "--no-calibration"])
    assert result.exit_code != 0


def test_an_expert_without_rows_leans_on_the_others(source: Checkpoint, imatrix: Path) -> None:
    """llama-quantize gives it ones; here it gets the pool."""
    stored = open_stored(imatrix, source, "fast")
    weights = dict(stored.known.weights)  # type: ignore[union-attr]
    old = weights["blk.0.ffn_down_exps.weight"]
    sums, counts = old.sums.copy(), old.counts.copy()
    sums[1], counts[1] = 0, 0
    weights["blk.0.ffn_down_exps.weight"] = Importance(sums, counts)
    dead = replace(stored, known=replace(stored.known, weights=weights))  # type: ignore[type-var]
    importance = shrunk_diagonal(dead.moments(0, source.geometry)["ffn_down_exps"], DIAGONAL_PRIOR)
    pool = importance[1] / importance[1].mean()
    others = torch.from_numpy(sums[[0, 2]] / counts[[0, 2], None])
    assert torch.corrcoef(torch.stack((pool, others.mean(0))))[0, 1] > 0.9
