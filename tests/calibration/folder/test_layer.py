"""INT4 of a small random layer beats rounding, and is exact where it must be."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import ct_reader
from helpers.tiny import write_tiny
from mmquant.calibration.folder.high import SignRoundOptions, repair, repaired_norm
from mmquant.calibration.folder.layer import as_read_back, quantize_layer
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.solve import expert_chunks
from mmquant.calibration.folder.variant import CalibratedWeights
from mmquant.calibration.model.forward import Observer, embed, layer_forward, rms_norm, route
from mmquant.calibration.statistics.live import LivePass, PassOptions
from mmquant.calibration.statistics.provider import LayerInputs
from mmquant.calibration.text.corpus import Corpus
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.weights import WeightsVariant, check_groups
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.open import open_source
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.runs.folder import write_folder

GROUP = 32
SHAPE = {"group_size": GROUP, "attention": "int4"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny") / "m"))


def corpus(windows: int = 24, length: int = 64, seed: int = 1) -> Corpus:
    tokens = torch.randint(0, 320, (windows, length), generator=torch.Generator().manual_seed(seed))
    return Corpus(tokens, torch.zeros(windows, dtype=torch.int64), ("random",), {})


@pytest.fixture(scope="module")
def inputs(source: Checkpoint) -> LayerInputs:
    return LivePass(source, corpus(), hidden=True).layer(0)


def options(method: str = "gptq", symmetric: bool = True, **more: object) -> LayerOptions:
    return LayerOptions(method=method, grid=GptqGrid(4, GROUP, symmetric), attention=True, **more)  # type: ignore[arg-type]


def output_error(source: Checkpoint, inputs: LayerInputs, weights: LayerWeights) -> float:
    assert inputs.hidden is not None
    hidden = inputs.hidden.all()
    wanted = layer_forward(inputs.weights, source.geometry, hidden)
    return float((layer_forward(weights, source.geometry, hidden) - wanted).square().mean())


def test_each_method_beats_the_one_before(source: Checkpoint, inputs: LayerInputs) -> None:
    errors = {}
    for name, chosen in {
        "rtn": options("rtn"),
        "awq": options("awq", symmetric=False),
        "fast": options(effort="fast"),
        "gptq": options(),
    }.items():
        found = quantize_layer(0, inputs.weights, inputs.statistics, chosen, source.geometry)
        errors[name] = output_error(source, inputs, as_read_back(inputs.weights, found))
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert errors["gptq"] < errors["fast"] == errors["rtn"]  # method rtn of this function rounds under diagonals too
    assert errors["awq"] < errors["rtn"]


def test_chunks_do_not_change_the_result(source: Checkpoint, inputs: LayerInputs) -> None:
    whole = quantize_layer(0, inputs.weights, inputs.statistics, options(), source.geometry)
    assert len(list(expert_chunks(inputs.weights, 1))) == 5
    single = quantize_layer(0, inputs.weights, inputs.statistics, options(memory=1), source.geometry)
    for name in ("gate", "down", "up"):
        assert (whole.experts[name].codes != single.experts[name].codes).float().mean() < 0.01


def test_equalization_keeps_the_function_and_the_experts_chosen(source: Checkpoint, inputs: LayerInputs) -> None:
    found = quantize_layer(0, inputs.weights, inputs.statistics, options("awq", symmetric=False), source.geometry)
    assert set(found.plain) == {"post_norm", "router", "input_norm"}
    assert torch.equal(found.plain["post_norm"], found.plain["post_norm"].bfloat16().float())
    assert inputs.hidden is not None
    hidden, g, w = inputs.hidden.all().flatten(0, 1), source.geometry, inputs.weights

    def chosen(norm: Tensor, router: Tensor) -> Tensor:
        x = rms_norm(hidden, norm, g.norm_eps)
        return route(x, router, w.router_bias, g).chosen.sort(-1).values

    before, after = chosen(w.post_norm, w.router), chosen(found.plain["post_norm"], found.plain["router"])
    assert torch.equal(before, after)


def test_an_expert_without_tokens_gets_the_layers_moments_and_is_reported(
    source: Checkpoint, inputs: LayerInputs
) -> None:
    def unseen(name: str) -> object:
        moments = getattr(inputs.statistics, name)
        keep = torch.ones(5)
        keep[2] = 0
        zeroed = {
            f.name: value * keep.view(-1, *[1] * (value.dim() - 1))
            for f in dataclasses.fields(moments)
            if (value := getattr(moments, f.name)) is not None
        }
        return dataclasses.replace(moments, **zeroed)

    gap = dataclasses.replace(inputs.statistics, expert_in=unseen("expert_in"), expert_mid=unseen("expert_mid"))
    found = quantize_layer(0, inputs.weights, gap, options(), source.geometry)
    assert found.report.unseen == (2,)
    assert any("experts 2 saw no token" in line for line in found.report.lines())
    back = as_read_back(inputs.weights, found)
    for name in ("gate", "down", "up"):
        error = (getattr(back, name)[2] - getattr(inputs.weights, name)[2]).norm() / getattr(inputs.weights, name)[
            2
        ].norm()
        assert 0.01 < error < 0.25


def test_an_overflow_is_cured_exactly(source: Checkpoint, inputs: LayerInputs) -> None:
    loud = dataclasses.replace(
        inputs.statistics.expert_mid,
        amax=torch.tensor([1.0, 3e5, 1.0, 1.0, 1.0]),
        sum32=torch.ones(5),
        sum16=torch.ones(5),
    )
    statistics = dataclasses.replace(inputs.statistics, expert_mid=loud)
    found = quantize_layer(0, inputs.weights, statistics, options(), source.geometry)
    plain = quantize_layer(0, inputs.weights, inputs.statistics, options(), source.geometry)
    assert found.report.rescaled == {1: 5}
    assert torch.equal(found.experts["up"].codes, plain.experts["up"].codes)
    assert torch.equal(found.experts["up"].scales[1] * 32, plain.experts["up"].scales[1])
    assert torch.equal(found.experts["down"].scales[1], plain.experts["down"].scales[1] * 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: dataclasses.replace(s, layer=1), "statistics of layer 1, expected layer 0"),
        (lambda s: dataclasses.replace(s, expert_in=s.expert_mid), "another checkpoint"),
        (lambda s: dataclasses.replace(s, expert_in=_with(s.expert_in, "second", float("nan"))), "NaN or infinity"),
        (lambda s: dataclasses.replace(s, expert_mid=dataclasses.replace(s.expert_mid, second=None)), "only diagonals"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(source: Checkpoint, inputs: LayerInputs, change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_layer(0, inputs.weights, change(inputs.statistics), options(), source.geometry)


def _with(moments, name: str, value: float):
    broken = getattr(moments, name).clone()
    broken.view(-1)[3] = value
    return dataclasses.replace(moments, **{name: broken})


def test_groups_that_straddle_devices_are_refused(source: Checkpoint) -> None:
    m27 = dataclasses.replace(source.geometry, hidden=3072, expert_width=1536)
    check_groups(m27, 128, 4)
    with pytest.raises(ValueError, match=r"1536/8 = 192 is not a multiple .* group sizes 32, 64, at most 6"):
        check_groups(m27, 128, 8)
    with pytest.raises(ValueError, match="group size 128 does not divide hidden 192 and expert width 160"):
        check_groups(source.geometry, 128)


def folder_error(source: Checkpoint, folder: Path) -> float:
    """Mean square error of the whole model's last hidden state, from the files."""
    read, hidden = open_source(folder), corpus(seed=2).tokens
    hidden = embed(read_globals(source), hidden)
    wanted = found = hidden
    for layer in range(source.geometry.layers):
        wanted = layer_forward(read_layer(source, layer), source.geometry, wanted)
        found = layer_forward(read_layer(read, layer), source.geometry, found)
    return float((found - wanted).square().mean() / (wanted - hidden).square().mean())


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq", "gptq"])
def test_folders_are_read_back_and_checked(source: Checkpoint, tmp_path: Path, layout: str) -> None:
    symmetric = layout != "awq"
    method = "awq" if layout == "awq" else "gptq"
    lines: list[str] = []
    variant = CalibratedWeights(
        **SHAPE, layout=layout, symmetric=symmetric, options=options(method, symmetric), report=lines.append
    )
    out = write_folder(source, variant, tmp_path / "out", provider=LivePass(source, corpus()))
    assert check_folder(out, source) == 3 * (4 + 5 * 3)
    nearest = write_folder(source, WeightsVariant(**SHAPE, layout="compressed-tensors"), tmp_path / "rtn")
    assert folder_error(source, out) < folder_error(source, nearest)


@pytest.mark.parametrize("attention", ["int4", "bf16", "fp8-channel"])
def test_widths_by_layer_are_read_alike_by_compressed_tensors(
    source: Checkpoint, tmp_path: Path, attention: str
) -> None:
    chosen = dataclasses.replace(options(), attention=attention == "int4")
    variant = CalibratedWeights(
        group_size=GROUP, attention=attention, eight_bit=(1,), options=chosen, report=lambda line: None
    )
    out = write_folder(source, variant, tmp_path / "out", provider=LivePass(source, corpus(6)))
    check_folder(out, source)
    ours, theirs = open_source(out), ct_reader.dequantized(out)
    for layer, largest in ((0, 0.2), (1, 0.01)):
        for projection in ("w1", "w2"):
            name = f"model.layers.{layer}.block_sparse_moe.experts.4.{projection}"
            original, found = source.read(name + ".weight"), theirs[name + ".weight"].float()
            assert (found - original).norm() / original.norm() < largest
            assert torch.allclose(found, ours.read(name + ".weight"), rtol=0.01, atol=1e-4)
    with pytest.raises(ValueError, match="8-bit layer 7: the model has layers 0 to 2"):
        dataclasses.replace(variant, eight_bit=(7,)).specs(source, 0)


class Cache(Observer):
    """The largest |k| and |v| that a cache would store."""

    def __init__(self) -> None:
        self.largest = [0.0, 0.0]

    def keys_values(self, k: Tensor, v: Tensor) -> None:
        self.largest = [max(have, float(x.abs().max())) for have, x in zip(self.largest, (k, v), strict=True)]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_scales_of_an_fp8_cache_hold_what_the_artifact_stores(source: Checkpoint, tmp_path: Path, method: str) -> None:
    variant = CalibratedWeights(**SHAPE, kv_cache="fp8", options=options(method), report=lambda line: None)
    out = write_folder(source, variant, tmp_path / "out", provider=LivePass(source, corpus()))
    check_folder(out, source)
    stored = ct_reader.tensors_of(out)
    scheme = QuantizationConfig.model_validate(ct_reader.quantization_config(out)).kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic) == (8, "float", "tensor", False)
    read, hidden = open_source(out), embed(read_globals(source), corpus().tokens)
    for layer in range(source.geometry.layers):
        cache = Cache()
        hidden = layer_forward(read_layer(read, layer), source.geometry, hidden, cache)
        for largest, name in zip(cache.largest, ("k_proj.k_scale", "v_proj.v_scale"), strict=True):
            scale = stored[f"model.layers.{layer}.self_attn.{name}"]
            assert scale.shape == (1,)
            assert scale.dtype == torch.float32
            assert float(scale) == pytest.approx(2 * largest / 448, rel=0.15), (layer, name)


def test_the_self_check_wants_every_scale_of_the_cache(source: Checkpoint, tmp_path: Path) -> None:
    variant = CalibratedWeights(**SHAPE, kv_cache="fp8", options=options(), report=lambda line: None)
    out = write_folder(source, variant, tmp_path / "out", provider=LivePass(source, corpus(4)))
    shard, name = next(out.glob("*.safetensors")), "model.layers.1.self_attn.v_proj.v_scale"
    good = load_file(shard)
    for value, words in (
        (None, "is missing beside"),
        (torch.zeros(1), "expected one positive"),
        (torch.ones(2), "one"),
    ):
        save_file({k: v for k, v in good.items() if k != name} | ({} if value is None else {name: value}), shard)
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            check_folder(out)
    save_file(good, shard)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(re.sub(r'"kv_cache_scheme": \{[^}]*\}', '"kv_cache_scheme": null', config))
    with pytest.raises(ValueError, match="k_scale is there without a kv_cache_scheme"):
        check_folder(out)


def test_high_effort_is_at_least_as_good_and_continues(source: Checkpoint, tmp_path: Path) -> None:
    lines: list[str] = []
    learning = SignRoundOptions(steps=20, batch=256, repair_norms=True, repair_bias=True)
    variant = CalibratedWeights(**SHAPE, options=options(effort="high"), learning=learning, report=lines.append)
    passes = PassOptions(propagate="quantized")
    out = write_folder(source, variant, tmp_path / "high", provider=LivePass(source, corpus(), passes, hidden=True))
    check_folder(out, source)
    plain = CalibratedWeights(**SHAPE, options=options(), report=lines.append)
    usual = write_folder(source, plain, tmp_path / "usual", provider=LivePass(source, corpus()))
    assert folder_error(source, out) < 1.05 * folder_error(source, usual)
    assert sum("routing" in line for line in lines) >= 2


def test_repair_brings_the_quantized_stream_back(source: Checkpoint, inputs: LayerInputs) -> None:
    """A stream whose channels shrank: norms undo it, and the router's choice comes back, each on held-out windows."""
    assert inputs.hidden is not None
    reference = inputs.hidden.all()
    generator = torch.Generator().manual_seed(0)
    off = 1 + 0.3 * torch.rand(source.geometry.hidden, generator=generator)
    noise = 0.02 * reference.std() * torch.randn(reference.shape, generator=generator)
    quantized, w, g = reference * off + noise, inputs.weights, source.geometry
    everything = SignRoundOptions(repair_norms=True, repair_router=True, repair_bias=True)
    found, shares = repair(w, g, reference, quantized, 20, everything)
    assert torch.equal(found["post_norm"], found["post_norm"].bfloat16().float())
    assert shares["post norm"] < 0.1
    assert shares["routing"] > shares["routing before"]
    norm, ratio = repaired_norm(w.input_norm, g.norm_eps, reference, quantized, 20)
    assert ratio < 0.1
    assert not torch.equal(norm, w.input_norm)
    assert repaired_norm(w.input_norm, g.norm_eps, reference, reference, 20)[1] <= 1.0
    assert repair(w, g, reference, reference, 20, everything) == ({}, {})
    nothing = SignRoundOptions(repair_norms=False, repair_router=False, repair_bias=False)
    assert repair(w, g, reference, quantized, 20, nothing)[0] == {}


def test_the_self_check_finds_faults(source: Checkpoint, tmp_path: Path) -> None:
    out = write_folder(source, WeightsVariant(**SHAPE), tmp_path / "out")
    shard = next(out.glob("*.safetensors"))
    good, name = load_file(shard), "model.layers.1.block_sparse_moe.experts.3.w2"

    def broken(words: str, **changes: Tensor | None) -> None:
        tensors = {k: v for k, v in good.items() if k not in changes} | {
            k: v for k, v in changes.items() if v is not None
        }
        save_file(tensors, shard)
        with pytest.raises(ValueError, match=words):
            check_folder(out, source)

    zero = torch.zeros_like(good[name + ".weight_packed"]) - 0x77777778
    broken("is zero throughout", **{name + ".weight_packed": zero})
    nan = good[name + ".weight_scale"].clone()
    nan[0, 0] = float("nan")
    broken("NaN or infinity|not finite", **{name + ".weight_scale": nan})
    other = good["model.layers.0.block_sparse_moe.experts.0.w2.weight_packed"].clone()
    broken("away from the original", **{"model.layers.0.block_sparse_moe.experts.4.w2.weight_packed": other})
    config = (out / "config.json").read_text()
    save_file(good, shard)
    (out / "config.json").write_text(config.replace('"Linear"', '"re:.*block_sparse_moe.*", "re:.*self_attn.*"'))
    with pytest.raises(ValueError, match=r"vLLM matches .* otherwise: .*experts\.0\.w1"):
        check_folder(out, source)
