"""`mmquant eval`: numbers, gates, exit codes, stored references, engines, the report, bad input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from helpers import llamacpp
from helpers.tiny import write_tiny
from mmquant.calibration.evaluate.metrics import compare, summarise
from mmquant.calibration.evaluate.reference_store import StoredReference, compare_stored, condense
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.text.corpus import bundled, digest, read_sets
from mmquant.commands.cli import cli
from mmquant.convert.manifest import read as read_manifest
from mmquant.convert.open import demo_folder, open_source
from mmquant.convert.source import read_globals, read_layer
from mmquant.errors import GateError, InputError, MmquantError
from mmquant.runs.evaluation import vllm_engine
from mmquant.runs.evaluation.engines import check_engine, difference
from mmquant.runs.evaluation.result import GATES, failures, quality_block, read_gate, validate
from mmquant.runs.evaluation.run import run
from mmquant.runs.evaluation.vllm_engine import Tops, compare_tops, devices_for, tops_of
from mmquant.runs.options_use import EvalOptions

FEW = ("--windows", "3", "--context", "64")


def mmquant(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


def message(result: Result) -> str:
    assert isinstance(result.exception, ValueError | MmquantError), result.exception
    text = str(result.exception)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT4 folder of the demo model."""
    out = tmp_path_factory.mktemp("eval") / "int4"
    done = CliRunner().invoke(cli, ["int4", "--model", "demo", "--method", "rtn", "--out", str(out)])
    assert done.exit_code == 0, done.exception
    return out


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "gguf"
    done = CliRunner().invoke(cli, ["gguf", "--model", "demo", "--type", "F32", "--out", str(out)])
    assert done.exit_code == 0, done.exception
    return next(out.glob("*.gguf"))


def test_json_has_the_keys_and_the_manifest_the_quality(folder: Path) -> None:
    done = mmquant(folder, "--reference", "demo", *FEW, "--json")
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    validate(result)
    keys = {"tokens", "context", "ppl", "ppl_reference", "kld", "top1", "nonfinite", "bytes", "bits_per_weight"}
    assert keys <= result.keys()
    assert {"mean", "median", "p90", "p99", "p999", "max", "mean_ci95"} <= result["kld"].keys()
    assert (result["tokens"], result["context"], result["nonfinite"]) == (3 * 63, 64, 0)
    assert 0.005 < result["kld"]["mean"] < 0.5
    assert len(result["candidates"][0]["layers"]) == 4
    for text in result["sample"]["texts"]:
        path = demo_folder().parent / "text" / "evaluation" / text["name"]
        assert text["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = read_manifest(folder)
    assert manifest is not None
    quality = manifest["artifacts"][0]["quality"]
    assert quality["status"] == "measured"  # no gate was asked for
    assert quality["metrics"]["kld"] == result["kld"]
    assert quality == quality_block(result)


def test_the_convention_of_llama_cpp_rounds_activations_as_it_does(gguf: Path, tmp_path: Path) -> None:
    small = ("--windows", "2", "--context", "32")
    few = ("--reference", gguf, *small, "--convention", "llama.cpp")
    rounded = json.loads(mmquant(gguf, *few, "--json").stdout)
    exact = json.loads(mmquant(gguf, *few, "--activations", "exact", "--json").stdout)
    assert (rounded["activations"], exact["activations"]) == ("llama.cpp", "exact")
    assert rounded["tokens"] == exact["tokens"] == 2 * 15
    assert rounded["ppl"] != exact["ppl"]  # an F32 file: only keys, values and queries are rounded
    assert rounded["ppl"] == pytest.approx(exact["ppl"], rel=1e-2)
    validate(rounded)
    for wrong in (("--dtype", "bfloat16"), ("--floor",)):
        assert "expected --activations exact" in message(mmquant(gguf, *few, *wrong))
    stored = tmp_path / "ref"
    assert mmquant(*few, "--save-reference", stored).exit_code == 0
    again = ("--reference-logits", stored, *small, "--convention", "llama.cpp")
    assert mmquant(gguf, *again).exit_code == 0
    assert "another activations" in message(mmquant(gguf, *again, "--activations", "exact"))


def test_several_candidates_in_one_document(folder: Path, gguf: Path) -> None:
    result = json.loads(mmquant(folder, gguf, "demo", "--reference", "demo", *FEW, "--floor", "--json").stdout)
    assert [c["label"] for c in result["candidates"]] == [str(folder), str(gguf), "demo"]
    assert "ppl" not in result
    int4, f32, itself = result["candidates"]
    assert int4["kld"]["mean"] > 100 * f32["kld"]["mean"]
    assert f32["kld"]["mean"] < 1e-6
    assert itself["kld"]["max"] == 0
    assert 0 < result["floor"]["kld"]["mean"] < int4["kld"]["mean"]
    single = json.loads(mmquant(folder, "--reference", "demo", *FEW, "--json").stdout)
    assert single["kld"]["mean"] == pytest.approx(int4["kld"]["mean"], rel=1e-9)


def test_the_table_names_what_was_measured(folder: Path) -> None:
    done = mmquant(folder, "--reference", "demo", *FEW)
    assert done.exit_code == 0
    assert "189 positions in 3 windows of 64 (all)" in done.stdout
    assert " docs " in done.stdout
    assert " zh " not in done.stdout  # none of the three windows
    assert "nonfinite" in done.stdout


def test_gates_exit_4_and_name_the_first_number(folder: Path, tmp_path: Path) -> None:
    done = mmquant(folder, "--reference", "demo", *FEW, "--max-kld", "1e-4", "--max-ppl-ratio", "1.0", "--json")
    assert isinstance(done.exception, GateError)
    assert done.exception.exit_code == 4
    assert "ppl_ratio is" in message(done)
    result = json.loads(done.stdout)
    assert [f.split(": ")[1].split(" is")[0] for f in result["gate"]["failures"]] == ["ppl_ratio", "kld.mean"]
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["artifacts"][0]["quality"]["status"] == "fail"
    gate = tmp_path / "recipe.yaml"
    gate.write_text("variants: []\ngate:\n  min_top1: 0.999\n  max_kld: 10\n")
    assert "top1 is" in message(mmquant(folder, "--reference", "demo", *FEW, "--gate", gate))
    assert mmquant(folder, "--reference", "demo", *FEW, "--max-kld", "10").exit_code == 0


def candidate(**changes: Any) -> dict[str, Any]:
    scores = compare(torch.randn(9, 7), torch.randn(9, 7), torch.zeros(9, dtype=torch.int64))
    return {"label": "x"} | summarise(scores, np.arange(9)) | changes


def test_nonfinite_positions_always_fail_and_first() -> None:
    found = failures(candidate(nonfinite=2), {"max_kld": 0.0})
    assert found[0] == "x: nonfinite is 2 of 9 positions, expected 0"
    assert len(found) == 2
    assert failures(candidate(), {}) == []
    assert failures(candidate(ppl_ratio=None), {"max_ppl_ratio": 9.0}) == [
        "x: ppl_ratio is nothing, expected at most 9"
    ]


def test_every_gate_is_a_number_of_the_result() -> None:
    for name in GATES:
        loose, strict = (1e9, -1e9) if name.startswith("max") else (-1e9, 1e9)
        assert failures(candidate(), {name: loose}) == []
        assert len(failures(candidate(), {name: strict})) == 1


def test_bad_gate_files(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    for text, words in (
        ("max_kl: 1", "unknown threshold max_kl"),
        ("max_kld: high", "max_kld is 'high', expected a number"),
        ("max_kld: .nan", "expected a number"),
        ("- 1", "a list, expected thresholds"),
        ("a: [", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_gate(path)


def test_reference_logits_are_stored_once_and_refused_for_anything_else(folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "demo.ref"
    live = mmquant(folder, "--reference", "demo", *FEW, "--save-reference", stored, "--json")
    again = mmquant(folder, "--reference-logits", stored, *FEW, "--json")
    assert again.exit_code == 0, again.exception
    first, second = json.loads(live.stdout), json.loads(again.stdout)
    assert second["reference"]["stored"]["kld_error_mean"] < 1e-4
    assert abs(first["kld"]["mean"] - second["kld"]["mean"]) < 1e-4
    assert second["candidates"][0]["layers"] == []
    for change, words in (
        (("--windows", "4", "--context", "64"), "another tokens"),
        (("--windows", "3", "--context", "32"), "another context"),
        ((*FEW, "--convention", "llama.cpp"), "another convention"),
        ((*FEW, "--text", demo_folder().parent / "text" / "evaluation" / "code.txt"), "another texts"),
        ((*FEW, "--reference", folder), "another model"),
    ):
        assert words in message(mmquant(folder, "--reference-logits", stored, *change))


def test_damaged_reference_logits(tmp_path: Path) -> None:
    assert mmquant("--reference", "demo", *FEW, "--save-reference", tmp_path / "ref").exit_code == 0
    whole = (tmp_path / "ref").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        spot = rng.integers(0, len(whole)) if rng.random() < 0.3 else len(whole) - 1 - rng.integers(0, 600)
        broken[spot] ^= int(rng.integers(1, 256))
        size = len(whole) if rng.random() < 0.7 else int(rng.integers(0, len(whole)))
        (tmp_path / "bad").write_bytes(bytes(broken[:size]))
        try:
            StoredReference(tmp_path / "bad").rows(0, 189)
        except (ValueError, OSError) as error:
            text = str(error)
            assert "\n" not in text, text


def test_the_noise_of_the_stored_form_is_as_stated() -> None:
    """Against exact KLD of a candidate that the writer never saw; codes are 16 bits, the tail one mass."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 3000, generator=generator) * 4
    other = base + torch.randn(40, 3000, generator=generator) * 0.7
    target = torch.arange(40)
    rows = condense(base, target, 5e-5)
    assert rows.count.max() < 3000
    stored, exact = compare_stored(rows, other, target), compare(base, other, target)
    assert np.abs(stored.kld - exact.kld).mean() < 1e-4
    assert (stored.kld <= exact.kld + 1e-4).all()
    np.testing.assert_array_equal(stored.same, exact.same)


def test_the_report_stands_alone(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = mmquant(folder, "--reference", "demo", *FEW, "--html", report)
    assert done.exit_code == 0, done.exception
    text = report.read_text()
    assert text.count("<svg") == 4
    assert "what others published" not in text  # of another model


def test_llama_cpp_beside_the_streamed_pass(gguf: Path) -> None:
    llamacpp.need()
    done = mmquant(gguf, "--reference", gguf, *FEW, "--engine", "llama.cpp", "--json")
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    check = result["engine_check"]
    assert check["reference"] == "llama.cpp"
    assert check["candidates"][0]["kld"]["max"] == 0
    assert abs(check["candidates"][0]["difference"]["ppl"]) < 1e-3
    against = json.loads(mmquant(gguf, "--reference", "demo", *FEW, "--engine", "llama.cpp", "--json").stdout)
    row = against["engine_check"]["candidates"][0]
    assert against["engine_check"]["reference"] == "mmquant"
    assert row["kld"]["mean"] < 1e-3
    assert row["top1"] > 0.98


def test_prompt_log_probabilities_give_the_same_numbers() -> None:
    """What vLLM returns (some log-probabilities a position) from a distribution that we know whole."""
    generator = torch.Generator().manual_seed(2)
    base, other = (torch.randn(6, 50, generator=generator) * 2 for _ in range(2))
    other = base + 0.3 * other
    target = torch.randint(0, 50, (6,), generator=generator)
    logp = torch.log_softmax(other.double(), -1)
    exact = compare(base, other, target)
    for kept in (50, 20):
        ids = [[*{*logp[i].topk(kept).indices.tolist(), int(target[i])}] for i in range(6)]
        flat = np.concatenate(ids)
        values = np.concatenate([logp[i, ids[i]].numpy() for i in range(6)])
        found = compare_tops(condense(base, target, 0.0), Tops(np.array([*map(len, ids)]), flat, values), target)
        np.testing.assert_allclose(found.nll, exact.nll, rtol=1e-9)
        np.testing.assert_array_equal(found.same, exact.same)
        if kept == 50:
            np.testing.assert_allclose(found.kld, exact.kld, atol=2e-4)  # the stored reference's steps of 2^-11
        else:
            assert (found.kld <= exact.kld + 2e-4).all()
            np.testing.assert_allclose(found.kld, exact.kld, atol=0.05)


class FlatLogprobs(SimpleNamespace):
    """vLLM's of one prompt: an empty first position, then each token itself and the most probable ones."""

    def __len__(self) -> int:
        return len(self.start_indices)


class DocumentedLLM:
    """What vLLM documents of LLM.generate, answered by our forward: it stands in for an engine that runs on GPUs only.

    It keeps the order and the shape of `prompt_logprobs`, and refuses parameters that vLLM does not have.
    """

    alive = 0
    backends: ClassVar[list[str | None]] = []

    def __init__(
        self,
        *,
        model: str,
        max_model_len: int,
        max_logprobs: int,
        enforce_eager: bool,
        tensor_parallel_size: int,
        enable_prefix_caching: bool,
        kv_cache_dtype: str,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        attention_backend: str | None = None,
        gpu_memory_utilization: float = 0.92,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError("1 validation error for CacheConfig\n  too much [type=less_than_equal, input_value=7]")
        DocumentedLLM.backends.append(attention_backend)
        self.source, self.length, self.most = open_source(model), max_model_len, max_logprobs
        print("INFO: as talkative as vLLM, on stdout")
        assert enforce_eager
        assert max_num_seqs <= max_num_batched_tokens
        assert not enable_prefix_caching
        assert kv_cache_dtype == "auto"
        assert tensor_parallel_size in (1, 2, 4)
        DocumentedLLM.alive += 1
        assert DocumentedLLM.alive == 1, "a second model does not fit beside the first"
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))

    def shutdown(self) -> None:
        DocumentedLLM.alive -= 1

    def generate(self, prompts: list[dict[str, list[int]]], params: SimpleNamespace, *, use_tqdm: bool) -> list[Any]:
        assert (params.max_tokens, params.temperature, params.detokenize) == (1, 0.0, False)
        assert not use_tqdm
        assert params.prompt_logprobs <= self.most
        return [SimpleNamespace(prompt_logprobs=self.answer(p["prompt_token_ids"], params)) for p in prompts]

    def answer(self, ids: list[int], params: SimpleNamespace) -> Any:
        assert len(ids) + params.max_tokens <= self.length
        g, outside = self.source.geometry, read_globals(self.source)
        hidden = embed(outside, torch.tensor([ids]))
        for layer in range(g.layers):
            hidden = layer_forward(read_layer(self.source, layer), g, hidden)
        logp = torch.log_softmax(final_logits(outside, g, hidden)[0], -1)
        found = FlatLogprobs(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
        for row, token in zip(logp[:-1], ids[1:], strict=True):
            names = [token, *row.topk(params.prompt_logprobs).indices.tolist()]
            found.start_indices.append(len(found.token_ids))
            found.token_ids += names
            found.logprobs += row[names].tolist()
            found.end_indices.append(len(found.token_ids))
        return found if params.flat_logprobs else None


@dataclass
class DocumentedArguments:
    """Some fields of vllm.EngineArgs, whose names are checked."""

    model: str = ""
    attention_backend: str | None = None
    gpu_memory_utilization: float = 0.92


@pytest.fixture
def documented_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__dict__.update(LLM=DocumentedLLM, SamplingParams=SimpleNamespace, __version__="documented")
    module.__dict__["EngineArgs"] = DocumentedArguments
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.usefixtures("documented_vllm")
def test_vllm_beside_the_streamed_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--reference", "demo", "--windows", "2", "--context", "24", "--engine", "vllm", "--json")
    off = []
    for convention, kept, artifacts in (("llama.cpp", 2048, [folder, demo_folder()]), ("all", 256, [folder])):
        monkeypatch.setattr(vllm_engine, "TOP", kept)
        done = mmquant(*artifacts, *few, "--convention", convention, "--activations", "exact")
        assert done.exit_code == 0, done.exception
        result = json.loads(done.stdout)
        row, *others = result["engine_check"]["candidates"]
        assert len(others) == len(artifacts) - 1
        assert row["tokens"] == 2 * (23 if convention == "all" else 11)
        assert row["difference"]["ppl"] == pytest.approx(0, abs=1e-5)
        assert row["difference"]["top1"] == 0
        assert set(row["seconds"]) == {"load", "score"}
        off.append(row["difference"]["kld_mean_nats"])
    assert off[0] == pytest.approx(0, abs=1e-3)
    assert off[1] < -1e-3  # tokens that vLLM was not asked for count as one: less than the exact distance
    assert "this machine has" in message(mmquant(folder, *few, "--tensor-parallel", "1024"))
    assert "--cache q8_0: vllm has none, expected 16bit or fp8" in message(mmquant(folder, *few, "--cache", "q8_0"))


@pytest.mark.usefixtures("documented_vllm")
def test_what_the_user_gives_the_engine(folder: Path) -> None:
    few = (folder, "--reference", "demo", "--windows", "1", "--context", "16", "--engine", "vllm", "--json")
    done = mmquant(
        *few, "--engine-arg", "attention_backend=TRITON_ATTN", "--engine-arg", "--gpu-memory-utilization=0.5"
    )
    assert done.exit_code == 0, done.exception
    check = json.loads(done.stdout)["engine_check"]
    assert check["arguments"] == {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.5}
    assert DocumentedLLM.backends[-1] == "TRITON_ATTN"
    for word, complaint in (
        ("gpu_memory_utilisation=0.5", "vllm has none; did you mean gpu_memory_utilization?"),
        ("max_model_len=4096", "--engine-arg max_model_len: mmquant sets it, expected --context"),
        ("gpu_memory_utilization=7", r"ValueError: 1 validation error for CacheConfig too much"),
    ):
        assert complaint in message(mmquant(*few, "--engine-arg", word))
    alone = (folder, "--reference", "demo", *FEW, "--engine-arg", "x=1")
    assert "--engine-arg: of an engine, expected --engine vllm" in message(mmquant(*alone))


def test_what_an_engine_must_answer() -> None:
    """A prompt without log-probabilities, too few of them, or without the prompt's own tokens is refused by name."""
    with pytest.raises(InputError, match="engine: nothing, expected the log-probabilities of a prompt of 3 tokens"):
        tops_of(None, 3)
    dicts: list[dict[int, SimpleNamespace] | None] = [None, {4: SimpleNamespace(logprob=-1.0)}]
    with pytest.raises(InputError, match="engine: 2 positions"):
        tops_of(dicts, 3)
    nested = tops_of([*dicts, {5: SimpleNamespace(logprob=-2.0), 4: SimpleNamespace(logprob=-0.5)}], 3)
    assert (nested.count.tolist(), nested.ids.tolist(), nested.logp.tolist()) == ([1, 2], [4, 5, 4], [-1.0, -2.0, -0.5])
    base = condense(torch.randn(2, 9), torch.tensor([4, 6]), 0.0)
    with pytest.raises(InputError, match="no log-probability of token 6, expected the prompt's own tokens"):
        compare_tops(base, nested, torch.tensor([4, 6]))
    broken = Tops(np.array([1, 1]), np.array([4, 6]), np.array([-1.0, np.nan]))
    assert compare_tops(base, broken, torch.tensor([4, 6])).finite.tolist() == [True, False]


def test_how_many_devices_an_engine_takes() -> None:
    assert [devices_for(None, found) for found in (0, 1, 2, 3, 4, 8)] == [1, 1, 2, 2, 4, 4]
    assert devices_for(3, 8) == 3
    with pytest.raises(InputError, match="expected --engine vllm"):
        check_engine("llama.cpp", (), 2)


def test_difference_is_relative_and_of_kld_absolute() -> None:
    mine, theirs = ({"ppl": a, "ppl_ratio": 1.0, "top1": 0.5, "kld": {"mean": b}} for a, b in ((5.0, 0.1), (5.5, 0.3)))
    found = difference(mine, theirs)
    assert found["ppl"] == pytest.approx(0.1)
    assert found["kld_mean_nats"] == pytest.approx(0.2)


def test_bad_input(folder: Path, gguf: Path, tmp_path: Path) -> None:
    assert "no --reference" in message(mmquant(folder))
    assert "no artifact" in message(mmquant("--reference", "demo"))
    for option in ("--html", "--save-reference"):  # before any work, not after it
        assert "expected a place that can be written" in message(
            mmquant("/nowhere", "--reference", "demo", option, "/proc/none/file")
        )
        assert "a folder, expected the name of a file" in message(
            mmquant("/nowhere", "--reference", "demo", option, tmp_path)
        )
    assert "no such file, expected thresholds" in message(
        mmquant("/nowhere", "--reference", "demo", "--gate", tmp_path / "none.yaml")
    )
    assert "not a folder" in message(mmquant(tmp_path / "none", "--reference", "demo"))
    assert "--engine vllm: vllm is not installed" in message(mmquant(gguf, "--reference", "demo", "--engine", "vllm"))
    assert "is not a GGUF file" in message(mmquant(folder, "--reference", "demo", "--engine", "llama.cpp"))
    assert "a context of 4096" in message(mmquant(folder, "--reference", "demo", "--context", "4096"))
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    assert "shorter than one window of 512" in message(mmquant(folder, "--reference", "demo", "--text", short))
    write_tiny(tmp_path / "other")
    shutil.copy(demo_folder() / "tokenizer.json", tmp_path / "other")
    assert "another model" in message(mmquant(tmp_path / "other", "--reference", "demo"))


def test_text_that_an_artifact_was_calibrated_on_is_refused(folder: Path, tmp_path: Path) -> None:
    mine, fresh = tmp_path / "mine.txt", tmp_path / "fresh.txt"
    mine.write_text("".join(f"the calibration's sentence number {i}, " for i in range(200)))
    fresh.write_text("".join(f"quite another one that bears number {i}, " for i in range(200)))
    page = tmp_path / "page.txt"
    lines = (bundled("calibration") / "prose.jsonl").read_text().splitlines()
    passage = max((str(json.loads(line)["text"]) for line in lines), key=len)[200:1200]
    page.write_text(fresh.read_text() + passage)
    (prose,) = read_sets([str(bundled("calibration") / "prose.jsonl")])
    small = ("--reference", "demo", *FEW, "--text")
    for number, (used, refused) in enumerate(((digest([mine.read_text()]), mine), (prose.sha256, page))):
        artifact = tmp_path / f"int4-{number}"
        shutil.copytree(folder, artifact)
        data = json.loads((artifact / "mmquant.fit.json").read_text())
        sets = [{"name": "a", "sha256": used, "windows": 3}]
        data["artifacts"][0]["provenance"]["run"]["calibration"] = {"corpus": {"sets": sets}}
        (artifact / "mmquant.fit.json").write_text(json.dumps(data))
        assert mmquant(artifact, *small, fresh).exit_code == 0
        complaint = message(mmquant(artifact, *small, refused))
        assert refused.name in complaint
        assert "was calibrated on it" in complaint or "overlaps the calibration text" in complaint
        assert mmquant(folder, *small, refused).exit_code == 0  # never calibrated


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo_folder(), other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    by_id = {number: token for token, number in vocab.items()}
    vocab[by_id[300]], vocab[by_id[301]] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(data))
    assert "token 300 is" in message(mmquant(other, "--reference", "demo", *FEW))
    data["model"]["vocab"].pop(by_id[5])
    (other / "tokenizer.json").write_text(json.dumps(data))
    assert "a tokenizer of 2047 tokens, the reference has 2048" in message(mmquant(other, "--reference", "demo", *FEW))
    (other / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not JSON" in message(mmquant(other, "--reference", "demo", *FEW))


def test_the_schema_itself_is_valid() -> None:
    path = Path(str(demo_folder())).parent / "schema" / "mmquant-eval-1.schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.slow
def test_torchrun_prints_once_and_equals_one_process(folder: Path, tmp_path: Path) -> None:
    arguments = ["-m", "mmquant", "eval", str(folder), "--reference", "demo", *FEW, "--device", "cpu", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, check=True)
    result = json.loads(done.stdout)
    alone = run((str(folder),), "demo", EvalOptions(windows=3, context=64))
    assert alone is not None
    assert result["kld"]["mean"] == pytest.approx(alone["kld"]["mean"], rel=1e-5)
    failed = subprocess.run(
        [*launcher, *arguments[:-1], "--text", str(tmp_path / "none")], capture_output=True, text=True, env=environment
    )
    assert failed.returncode != 0
    assert "no such text file" in failed.stderr


GOLDEN = os.environ.get("MMQUANT_GOLDEN")
BASELINE = {  # golden/llama.cpp/baseline.md: PPL and mean KLD by llama-perplexity, 60 chunks of 512, reference BF16
    "Q8_0": (5.394912, 0.001422), "Q6_K": (5.408581, 0.005694), "Q5_K_M": (5.425199, 0.010394),
    "Q4_K_M": (5.477818, 0.027470), "Q4_K_S": (5.494954, 0.028924), "IQ4_XS": (5.538937, 0.040677),
    "Q3_K_M": (5.703331, 0.080141), "IQ3_S": (5.965377, 0.120218), "Q2_K": (7.242141, 0.339077),
}  # fmt: skip
CHANCE = 2e-4  # nats: roundings to 8 bits that another order of addition turns over (docs/eval.md)


@pytest.mark.slow
@pytest.mark.skipif(GOLDEN is None, reason="MMQUANT_GOLDEN names the folder with stock GGUFs and their text")
def test_llama_perplexitys_numbers_within_half_a_percent() -> None:
    """Of the GGUF files that stock llama.cpp made of the demo model, where somebody keeps them."""
    folder = Path(str(GOLDEN))
    files = {name: folder / f"{name}.gguf" for name in BASELINE if (folder / f"{name}.gguf").is_file()}
    assert files, f"{folder} holds none of {', '.join(BASELINE)}"
    paths = tuple(map(str, files.values()))
    text = (str(folder / "evaluation.txt"),)
    result = run(paths, "demo", EvalOptions(text=text, convention="llama.cpp", windows=60, context=512))
    assert result is not None
    for name, found in zip(files, result["candidates"], strict=True):
        ppl, kld = BASELINE[name]
        assert found["ppl"] == pytest.approx(ppl, rel=0.005), name
        assert found["kld"]["mean"] == pytest.approx(kld, rel=0.005, abs=CHANCE), name
