"""Types per tensor equal llama-quantize's own dry run.

tests/data/llama_quantize_types.json: `llama_model_quantize(dry_run)` of llama.cpp v0.5.0 (npm
@node-llama-cpp/linux-x64 3.22.1) over sparse BF16 files of these shapes, with an importance matrix and without: runs of
equal types along the layers, per tensor role.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from helpers.paths import DATA
from mmquant.convert.gguf.mixes import MIXES, PLAIN, find_mix, parse_overrides, tensor_bytes, tensor_types
from mmquant.convert.gguf.names import all_shapes, is_quantizable, release_name, split_block
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes

M27 = Geometry(62, 3072, 48, 8, 128, 256, 8, 1536, 200064, 64, 5e6, 1e-6, 196608)
DEMO = Geometry(4, 256, 4, 2, 64, 16, 4, 256, 2048, 32, 5e6, 1e-6, 2048)
SHAPES = {
    "m27": M27,
    "demo": DEMO,
    "eight": replace(DEMO, layers=16, experts=8),
    "wide": replace(DEMO, layers=24, heads=8, kv_heads=2, experts=12),
    "ragged": replace(DEMO, layers=9, hidden=288, expert_width=320, heads=4, head_dim=72),
    "odd": replace(DEMO, hidden=264, expert_width=328, heads=4, head_dim=66),
}
TABLE = json.loads((DATA / "llama_quantize_types.json").read_text())
QUANTIZED = [name for name, mix in MIXES.items() if mix.base not in PLAIN]
# MiB of tensor data that llama-quantize reports for M2.7 (shared notes on llama.cpp, section 3)
MIB = {
    "Q2_K": 79436, "Q2_K_S": 73958, "Q3_K_S": 94111, "Q3_K_M": 104202, "Q3_K_L": 112860, "Q4_K_S": 124002,
    "Q4_K_M": 131926,
    "Q5_K_S": 150175, "Q5_K_M": 154777, "Q6_K": 179057, "Q8_0": 231865, "IQ4_XS": 116226, "IQ3_M": 95355,
    "IQ3_S": 94135,
    "IQ3_XS": 88998, "IQ3_XXS": 83871, "IQ2_M": 71361, "IQ2_S": 64877, "IQ2_XS": 63841, "IQ2_XXS": 57322,
    "IQ1_M": 49216,
    "IQ1_S": 44352, "Q4_0": 123496, "MXFP4_MOE": 118033,
}  # fmt: skip


def runs(types: list[str]) -> str:
    out: list[list] = []
    for kind in types:
        if out and out[-1][0] == kind:
            out[-1][1] += 1
        else:
            out.append([kind, 1])
    return " ".join(f"{kind}*{count}" for kind, count in out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("importance", [True, False])
def test_types_are_llama_quantizes(shape: str, importance: bool) -> None:
    geometry = SHAPES[shape]
    shapes = all_shapes(geometry)
    for name in QUANTIZED:
        roles: dict[str, list[str]] = {}
        for tensor, kind in tensor_types(MIXES[name], geometry, importance=importance).items():
            if is_quantizable(tensor, shapes[tensor]):
                roles.setdefault(split_block(tensor)[1].removesuffix(".weight"), []).append(kind)
            else:
                assert kind == "F32"
        expected = TABLE[shape][name + ("" if importance else " without importance")]
        assert {role: runs(kinds) for role, kinds in roles.items()} == expected, name


@pytest.mark.parametrize("name", MIB)
def test_sizes_of_m27(name: str) -> None:
    types, shapes = tensor_types(MIXES[name], M27), all_shapes(M27)
    total = sum(tensor_bytes(kind, shapes[tensor]) for tensor, kind in types.items())
    assert abs(total / 2**20 - MIB[name]) <= 1


def test_every_release_tensor_has_one_gguf_name() -> None:
    geometry = replace(DEMO, layers=2, experts=3)
    release = set(global_shapes(geometry))
    for layer in range(geometry.layers):
        release |= {name + ".weight" for name, _ in matrix_shapes(geometry, layer)}
        release |= {name for name, _ in plain_shapes(geometry, layer)}
    named = []
    for name in all_shapes(geometry):
        experts = range(geometry.experts) if "_exps" in name else [None]
        named += [release_name(NAMES, name, expert) for expert in experts]
    assert len(named) == len(release)
    assert set(named) == release
    assert len(all_shapes(M27)) == 809


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q", "blk.0.ffn_up.weight", "attn_q.weight", "blk.0.ffn_down_exps.weight", "blk.x.attn_q.weight"],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a tensor of this architecture"):
        release_name(NAMES, name)


def test_overrides_and_plan() -> None:
    overrides = parse_overrides(("ffn_down_exps=Q6_K", r"blk\.3\.=q5_k", "token_embd=q8_0"))
    plan = {"blk.3.ffn_down_exps.weight": "Q3_K", "output.weight": "Q8_0"}
    types = tensor_types(find_mix("q4_k"), DEMO, overrides=overrides, plan=plan)
    assert types["blk.0.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.3.ffn_down_exps.weight"] == "Q3_K"  # the plan wins
    assert types["blk.3.attn_q.weight"] == "Q5_K"
    assert types["blk.3.ffn_gate_inp.weight"] == "F32"  # never quantized, whatever the pattern says
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K"


@pytest.mark.parametrize("item", ["ffn", "=Q4_K", "ffn=Q4_Z", "ffn(=Q4_K", "a{99999999999}=Q4_K"])
def test_bad_overrides(item: str) -> None:
    with pytest.raises(ValueError, match="--tensor-type"):
        parse_overrides((item,))


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="--type Q9_K: unknown"):
        find_mix("Q9_K")
    with pytest.raises(ValueError, match=r"plan: blk\.9\.attn_q"):
        tensor_types(find_mix("Q4_K_M"), DEMO, plan={"blk.9.attn_q.weight": "Q4_K"})
    with pytest.raises(ValueError, match="multiple of 256"):
        tensor_bytes("Q4_K", (3, 288))
