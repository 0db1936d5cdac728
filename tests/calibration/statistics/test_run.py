"""The calibration pass: memory-limited chunks, propagation, resume after SIGKILL, processes, storage."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.calibration_cases import begin, corpus, files, model, options, ranks, run, tensors
from helpers.killed import BYTES, killed_at
from mmquant.calibration.model.distributed import rank_share
from mmquant.calibration.model.reading import read_layer_shared
from mmquant.calibration.model.stream import Stream
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.calibration.statistics.layer_pass import calibrate_layer, plan_moments
from mmquant.calibration.statistics.live import LivePass, StoredPass
from mmquant.calibration.statistics.run import calibrate_into, needs
from mmquant.calibration.statistics.store import open_statistics
from mmquant.calibration.statistics.triangles import square, stored_bytes, triangle
from mmquant.convert.files.lock import hold
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.open import open_native
from mmquant.convert.source import read_layer
from mmquant.errors import FitError, InputError


def equal(a: LayerStatistics, b: LayerStatistics) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def near(a: LayerStatistics, b: LayerStatistics, tolerance: float = 1e-5) -> None:
    first, second = tensors(a), tensors(b)
    for name, value in first.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((value - second[name]).abs().max()) <= tolerance * scale, name


def test_the_store_gives_back_what_was_written(tmp_path: Path) -> None:
    source = model(tmp_path)
    found = run(source, tmp_path / "out")
    stored = open_statistics(tmp_path / "out")
    assert stored.full
    assert stored.layers == 3
    for layer, value in enumerate(found):
        equal(value, stored.layer(layer))
        light = stored.layer(layer, second=False)
        assert light.expert_in.second is None
        assert torch.equal(light.expert_mid.diagonal, value.expert_mid.diagonal)
        squares = stored.squares(layer)
        assert squares is not None
        assert value.expert_in.second is not None
        torch.testing.assert_close(squares[0], value.expert_in.second.square().sum((1, 2)))
    file = tmp_path / "out" / "layer-001.safetensors"
    assert load_file(file)["expert_mid.second"].shape == (5, 40 * 41 // 2)  # readable by anybody
    head = int.from_bytes(file.read_bytes()[:8], "little")
    g = open_native(source).geometry
    assert file.stat().st_size - 8 - head == stored_bytes(g, True, "float32") + 4 * 5  # a second domain's load


def test_half_the_bytes_in_bfloat16_and_few_without_moments(tmp_path: Path) -> None:
    source = model(tmp_path)
    whole = run(source, tmp_path / "whole")
    run(source, tmp_path / "half", dtype="bfloat16")
    half = open_statistics(tmp_path / "half").layer(2)
    assert half.expert_in.second is not None
    assert whole[2].expert_in.second is not None
    error = (half.expert_in.second - whole[2].expert_in.second).norm() / whole[2].expert_in.second.norm()
    assert 1e-5 < error < 2**-8
    assert torch.equal(half.expert_in.diagonal, whole[2].expert_in.diagonal)
    run(source, tmp_path / "diagonal", collect=Collect(full=False))
    light = open_statistics(tmp_path / "diagonal")
    assert not light.full
    assert light.layer(2).expert_in.second is None
    torch.testing.assert_close(light.layer(2).expert_in.diagonal, whole[2].expert_in.diagonal)
    sizes = [(tmp_path / n / "layer-000.safetensors").stat().st_size for n in ("whole", "half", "diagonal")]
    assert sizes[0] > 1.7 * sizes[1]
    assert sizes[1] > 1.7 * sizes[2]


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_triangles_unpack_to_the_square(n: int) -> None:
    value = torch.randn(3, n, n)
    value = value + value.mT
    packed = torch.stack([triangle(part) for part in value])
    assert packed.shape == (3, n * (n + 1) // 2)
    assert torch.equal(square(packed, n), value)


def test_a_memory_limit_means_more_passes_and_the_same_bits(tmp_path: Path) -> None:
    source, text = open_native(model(tmp_path)), corpus()
    g = source.geometry
    whole = LivePass(source, text, options()).layer(0).statistics
    each, fixed = 4 * (g.hidden**2 + g.expert_width**2), 4 * (g.hidden**2 + (g.heads * g.head_dim) ** 2)
    for experts in (1, 2, 4):
        live = LivePass(source, text, options(memory=fixed + experts * each))
        assert live.plan.passes == -(-g.experts // experts)
        assert live.plan.results == "file"
        assert live.plan.bytes <= fixed + experts * each
        equal(whole, live.layer(0).statistics)
    every = LivePass(source, text, options(collect=Collect(experts="all"))).layer(1).statistics
    few = LivePass(source, text, options(collect=Collect(experts="all"), memory=2 * fixed + each)).layer(1).statistics
    equal(every, few)
    with pytest.raises(FitError, match=r"0\.01 GiB are left for moments, one expert's and the attention's"):
        LivePass(source, text, options(memory=1000))


def test_the_plan_of_m27_in_full() -> None:
    from dataclasses import replace

    from mmquant.convert.open import open_source

    g = replace(open_source("demo").geometry, hidden=3072, expert_width=1536, experts=256, heads=48, head_dim=128)
    total = 256 * 4 * (3072**2 + 1536**2)
    fixed = 4 * (3072**2 + 6144**2)
    assert 12.0e9 < total < 12.2e9
    assert plan_moments(g, Collect(), total + fixed).passes == 1
    third = plan_moments(g, Collect(), 5 * 10**9, host=64 * 10**9)
    assert (third.passes, third.chunk, third.results) == (3, 86, "host")
    assert third.bytes <= 5 * 10**9
    assert plan_moments(g, Collect(), 5 * 10**9, host=8 * 10**9).results == "file"
    assert plan_moments(g, Collect(full=False), 0).passes == 1
    assert plan_moments(g, Collect(experts="all"), 4 * 10**9).passes == 1  # one shared moment for w1 and w3


def test_needs_are_what_a_run_takes(tmp_path: Path) -> None:
    path = model(tmp_path)
    source, text = open_native(path), corpus()
    need = needs(source, text, options(), "float32")
    run(path, tmp_path / "out")
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("layer-*"))
    assert need.statistics <= written < need.statistics + 3 * 16384  # headers
    assert need.hidden == 4 * text.tokens.numel() * source.geometry.hidden


def test_a_run_killed_at_any_change_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Before each file is opened, renamed or removed: so also between every two renames."""
    source = model(tmp_path, layers=2)
    run(source, tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    count, out = 1, tmp_path / "killed-1"
    while killed_at(out, count, partial(run, source, out)):
        run(source, out)
        assert files(out) == wanted, count
        count, out = count + 1, tmp_path / f"killed-{count + 1}"
    assert count > 16  # each layer opens and renames its file, the hidden states and the manifest


@pytest.mark.parametrize("disk_limit", [1 << 30, 0])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, disk_limit: int) -> None:
    """Each new process dies somewhere else: before its n-th change, or inside a file that it writes."""
    source = model(tmp_path, layers=4)
    run(source, tmp_path / "whole", windows=60)
    rng, out = random.Random(disk_limit), tmp_path / "out"
    least = min(len(data) for name, data in files(tmp_path / "whole").items() if name.startswith("layer"))
    for pattern in ["", BYTES, "", "", BYTES, ""]:
        count = rng.randrange(least) if pattern == BYTES else rng.randint(3, 9)
        work = partial(run, source, out, windows=60, disk_limit=disk_limit)
        assert killed_at(out, count, work, pattern), "it ended before its point"
    run(source, out, windows=60, disk_limit=disk_limit)
    assert files(out) == files(tmp_path / "whole")


def test_nothing_but_the_statistics_is_left(tmp_path: Path) -> None:
    run(model(tmp_path), tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == [*(f"layer-{n:03d}.safetensors" for n in range(3)), "statistics.json"]


def noisy(weights: LayerWeights) -> LayerWeights:
    return LayerWeights(**{**vars(weights), "down": weights.down * 1.05})


def test_the_next_layer_sees_what_is_propagated(tmp_path: Path) -> None:
    source, text = open_native(model(tmp_path)), corpus()
    reference = LivePass(source, text, options())
    quantized = LivePass(source, text, options(propagate="quantized"), hidden=True)
    a, b = reference.layer(0), quantized.layer(0)
    equal(a.statistics, b.statistics)
    for layer in (1, 2):
        assert b.hidden is not None
        quantized.quantized(layer - 1, noisy(b.weights))
        a, b = reference.layer(layer), quantized.layer(layer)
    # By hand: the layers one after the other with the changed weights before the last.
    stream = Stream(source, text.tokens, batch=3)
    stream.start(0)
    for layer in range(2):
        stream.advance(noisy(read_layer(source, layer)))
    plan = plan_moments(source.geometry, Collect(), 1 << 30)
    by_hand = calibrate_layer(stream, read_layer(source, 2), text.domain, 2, Collect(), plan)
    equal(b.statistics, by_hand)
    assert not torch.equal(a.statistics.expert_in.diagonal, b.statistics.expert_in.diagonal)


def test_a_live_pass_shows_the_entering_stream_and_skips_layers(tmp_path: Path) -> None:
    source, text = open_native(model(tmp_path)), corpus()
    live = LivePass(source, text, options(), hidden=True)
    whole = [LivePass(source, text, options()).layer(n).statistics for n in range(3)]
    late = live.layer(2)
    equal(late.statistics, whole[2])
    assert late.hidden is not None
    stream = Stream(source, text.tokens, batch=3)
    stream.start(2)
    assert torch.equal(late.hidden.all(), stream.hidden.all())
    with pytest.raises(ValueError, match="goes forward only"):
        live.layer(0)


def test_a_live_pass_continues_from_its_hidden_states(tmp_path: Path) -> None:
    source, text = open_native(model(tmp_path)), corpus()
    folder = tmp_path / "run"
    first = LivePass(source, text, options(propagate="quantized"), folder=folder)
    for layer in range(2):
        first.quantized(layer, noisy(first.layer(layer).weights))
    rest = LivePass(source, text, options(propagate="quantized"), folder=folder).layer(2)
    equal(first.layer(2).statistics, rest.statistics)
    with pytest.raises(ValueError, match="no hidden states of layer 2 to continue from"):
        LivePass(source, text, options(propagate="quantized"), folder=tmp_path / "other").layer(2)


def test_stored_statistics_are_refused_for_another_model_or_corpus(tmp_path: Path) -> None:
    source = model(tmp_path)
    run(source, tmp_path / "out")
    stored, native = open_statistics(tmp_path / "out"), open_native(source)
    stored.check(native.fingerprint, 3, corpus().fingerprint)
    with pytest.raises(ValueError, match=r"out: statistics of another checkpoint .*, expected fingerprint ffff"):
        stored.check("f" * 64)
    with pytest.raises(ValueError, match="statistics of another corpus"):
        stored.check(native.fingerprint, 3, corpus(seed=1).fingerprint)
    with pytest.raises(ValueError, match="3 of 4 layers; run mmquant calibrate again"):
        stored.check(native.fingerprint, 4)
    inputs = StoredPass(native, stored).layer(1)
    equal(inputs.statistics, stored.layer(1))
    other = model(tmp_path / "second", layers=3)
    weights = load_file(other / "model-00001-of-00003.safetensors")
    assert weights
    with pytest.raises(
        ValueError,
        match=r"of another run: --seed 0, now 1; .* start over with --fresh",
    ):
        list(calibrate_into(native, corpus(seed=1), tmp_path / "out", options()))
    with pytest.raises(ValueError, match="--weighting router, now uniform"):
        list(calibrate_into(native, corpus(), tmp_path / "out", options(collect=Collect(weighting="uniform"))))


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    run(model(tmp_path), tmp_path / "out")
    file = tmp_path / "out" / "layer-002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    stored = open_statistics(tmp_path / "out")
    with pytest.raises(ValueError, match=r"layer-002.safetensors: \d+, expected \d+ bytes .*: damaged"):
        stored.layer(2)
    with pytest.raises(ValueError, match="3 layers, no layer 3"):
        stored.layer(3)
    manifest = tmp_path / "out" / "statistics.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"statistics\.json: not JSON"):
        open_statistics(tmp_path / "out")
    manifest.write_text(json.dumps({"format": 9, "layers": []}))
    with pytest.raises(ValueError, match="format 9, expected 2"):
        open_statistics(tmp_path / "out")
    with pytest.raises(ValueError, match=r"no statistics.json, expected a folder written by mmquant calibrate"):
        open_statistics(tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"strange: holds notes.txt"):
        run(tmp_path / "model", tmp_path / "strange")


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once_and_evenly(count: int, size: int) -> None:
    parts = [rank_share(count, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_single_process_statistics(tmp_path: Path, size: int) -> None:
    source = model(tmp_path)
    alone = run(source, tmp_path / "alone")

    def work() -> None:
        native = open_native(source)
        shared, own = read_layer_shared(native, 1), read_layer(native, 1)
        for name, value in vars(own).items():
            assert torch.equal(value, getattr(shared, name)), name
        run(source, tmp_path / "shared")

    ranks(size, work)
    stored = open_statistics(tmp_path / "shared")
    for layer, value in enumerate(alone):
        found = stored.layer(layer)
        near(value, found)
        assert torch.equal(value.routing.load, found.routing.load)
    again = tmp_path / "again"
    ranks(size, lambda: run(source, again))
    assert files(again) == files(tmp_path / "shared")


def test_ranks_continue_where_they_were_killed(tmp_path: Path) -> None:
    source = model(tmp_path)
    ranks(2, lambda: run(source, tmp_path / "whole"))
    ranks(2, lambda: begin(source, tmp_path / "out"))
    assert open_statistics(tmp_path / "out").layers == 2
    ranks(2, lambda: run(source, tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_flipped_bit_is_found_when_a_file_is_first_used(tmp_path: Path) -> None:
    run(model(tmp_path), tmp_path / "out")
    file = tmp_path / "out" / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    stored = open_statistics(tmp_path / "out")
    stored.layer(0)
    for use in (stored.layer, stored.squares):
        with pytest.raises(InputError, match=r"layer-001\.safetensors: SHA-256 .* as it was written: damaged"):
            use(1)


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"format": 2}', '{"format": 2, "layers": [{"layer": 0}], "identity": {}}']
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, damage: str) -> None:
    source = model(tmp_path)
    run(source, tmp_path / "out")
    (tmp_path / "out" / "statistics.json").write_text(damage)
    before = files(tmp_path / "out")
    for use in (lambda: open_statistics(tmp_path / "out"), lambda: run(source, tmp_path / "out")):
        with pytest.raises(InputError, match=r"statistics\.json: "):
            use()
    assert files(tmp_path / "out") == before


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path)
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"), pytest.raises(InputError, match=r"in use by process \d+ on"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
