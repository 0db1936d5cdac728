"""`mmquant plan` on a tiny model: measured, resumed, chosen, written; damaged files and impossible budgets."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner

from helpers.killed import killed_at
from helpers.tiny import write_tiny
from mmquant import GgufOptions, InputError, PlanOptions, plan, quantize_gguf
from mmquant.commands.gguf import command as gguf_command
from mmquant.commands.plan import command
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.open import demo_folder
from mmquant.convert.plan_file import read_plan_file
from mmquant.errors import FitError
from mmquant.runs.plan import SENSITIVITY
from mmquant.runs.plan_plot import draw
from mmquant.runs.plan_target import budgets_of

SIZE = 1_400_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(
        tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=2, num_local_experts=4, vocab_size=2048
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder / name)
    words = random.Random(1)
    for name in ("text", "other"):
        lines = (" ".join(chr(97 + words.randrange(26)) * words.randrange(1, 5) for _ in range(9)) for _ in range(80))
        (folder.parent / f"{name}.txt").write_text("\n".join(lines))
    return folder


def options(model: Path, **changes: Any) -> Any:
    kind = changes.pop("kind", PlanOptions)
    text, other = (str(model.parent / f"{name}.txt") for name in ("text", "other"))
    shared = {"text": (text,), "evaluation": (other,), "text_only": True, "windows": 8, "context": 32}
    return kind(**{**shared, "judged_windows": 2, **changes})


def ggml_types(path: Path) -> dict[str, str]:
    """By gguf-py, not by us."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "plan"
    found = plan(model, out, options(model, size=SIZE))
    assert found.plan.kld > 0
    assert "attn_q" in "\n".join(found.lines(explain=True))
    return out


def test_the_written_file_has_the_planned_bytes_and_types(model: Path, made: Path, tmp_path: Path) -> None:
    chosen = read_plan_file(made / "plan.json")
    written = quantize_gguf(
        model, tmp_path / "out", options(model, kind=GgufOptions, plan=made / "plan.json", windows=4)
    )
    found = GgufSource(written.path)
    assert found.bytes == chosen.bytes
    assert written.path.stat().st_size <= SIZE
    types = ggml_types(written.path)
    assert {name: types[name] for name in chosen.tensors} == chosen.tensors


def test_measured_once_and_monotone_in_the_budget(model: Path, made: Path, tmp_path: Path) -> None:
    path = made / SENSITIVITY
    klds = [plan(model, tmp_path, PlanOptions(bits=bits, sensitivity=path)).plan.kld for bits in (5.0, 6.0, 8.4)]
    assert klds == sorted(klds, reverse=True)
    before = path.stat().st_mtime_ns
    plan(model, made, options(model, size=SIZE))
    assert path.stat().st_mtime_ns == before


def test_a_killed_measurement_goes_on_to_the_same_numbers(model: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed_at(out, 2, lambda: plan(model, out, options(model, size=SIZE)), r"rename .*sensitivity")
    assert not (out / SENSITIVITY).exists()
    plan(model, out, options(model, size=SIZE))
    assert (out / SENSITIVITY).read_bytes() == (made / SENSITIVITY).read_bytes()
    assert {p.name for p in out.iterdir() if not p.name.startswith(".mmquant")} == {"plan.json", SENSITIVITY}


def test_one_command_plans_and_writes(model: Path, made: Path, tmp_path: Path) -> None:
    chosen = options(model, kind=GgufOptions, size=SIZE, sensitivity=made / SENSITIVITY, windows=4)
    written = quantize_gguf(model, tmp_path / "out", chosen)
    assert written.path.stat().st_size <= SIZE
    again = quantize_gguf(model, tmp_path / "out", chosen)
    assert again.path == written.path


def test_impossible_budgets_name_the_smallest_that_works(model: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="the smallest takes") as error:
        plan(model, tmp_path, PlanOptions(size=1000, sensitivity=made / SENSITIVITY))
    least = int(str(error.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    plan(model, tmp_path, PlanOptions(size=least, sensitivity=made / SENSITIVITY))
    with pytest.raises(FitError, match="the smallest takes"):
        plan(model, tmp_path, PlanOptions(size=least - 1, sensitivity=made / SENSITIVITY))


def test_a_target_has_two_budgets(model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmquant.runs.planner_gguf.budgets_of", lambda *_: (900_000, 1_000_000))
    found = plan(model, tmp_path, PlanOptions(target="24GB+96GB", target_context=512, sensitivity=made / SENSITIVITY))
    assert found.plan.placement == {"n_cpu_moe": 1}
    monkeypatch.setattr("mmquant.runs.planner_gguf.budgets_of", lambda *_: (1_000_000, 100_000))
    with pytest.raises(FitError, match="GiB beside the card"):
        plan(model, tmp_path, PlanOptions(target="24GB+96GB", target_context=512, sensitivity=made / SENSITIVITY))


def test_bad_words(model: Path, made: Path, tmp_path: Path) -> None:
    from mmquant.convert.open import open_native

    g = open_native(str(model)).geometry
    for target in ("24GB+", "card", "+96GB", "24GB+96GB+1GB"):
        with pytest.raises(InputError):
            budgets_of(target, g, 512)
    with pytest.raises(InputError, match="at most 512"):
        budgets_of("24GB+96GB", g, 513)
    with pytest.raises(InputError, match="expected one of them"):
        plan(model, tmp_path, PlanOptions(size=5, bits=2.0))
    two, one = budgets_of("2x24GB+96GB", g, 512), budgets_of("24gb+96gb", g, 512)
    assert (two[0] or 0) > (one[0] or 0) > 0
    assert budgets_of("128GB-unified", g, 512)[0] is None
    result = CliRunner().invoke(command, ["--model", str(model), "--out", str(tmp_path), "--size", "much"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mmquant_plan", 2, "expected 1"),
        ("format", "exl3", "expected gguf"),
        ("format", "int4", "a plan for mmquant int4"),
        ("tensors", {"output.weight": 3}, "expected a string"),
        ("tensors", {"output.weight": "Q8_0"}, "expected every matrix"),
        ("model", "0" * 64, "planned for another model"),
        ("bytes", 7, "changed by hand"),
        ("reasons", {"output.weight": 1}, "expected an object"),
        ("curve", [1], "expected an object"),
    ],
)
def test_damaged_plans_are_one_line(model: Path, made: Path, tmp_path: Path, key: str, value: Any, says: str) -> None:
    document = json.loads((made / "plan.json").read_text())
    document[key] = value
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=says) as error:
        quantize_gguf(model, tmp_path / "out", options(model, kind=GgufOptions, plan=tmp_path / "plan.json"))
    assert "\n" not in str(error.value)


def test_damaged_sensitivities_are_one_line(model: Path, made: Path, tmp_path: Path) -> None:
    whole = json.loads((made / SENSITIVITY).read_text())
    path = tmp_path / SENSITIVITY
    for change in (
        {"mmquant_sensitivity": 0},
        {"model": "x"},
        {"format": "int4"},
        {"groups": {}},
        {"groups": {**whole["groups"], "output.weight": {"error": {"Q8_0": -1.0}, "kld": {}}}},
        {"judged": ["one"]},
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=SENSITIVITY):
            plan(model, tmp_path, PlanOptions(size=SIZE, sensitivity=path))


def test_a_plan_is_drawn(made: Path, tmp_path: Path) -> None:
    draw(read_plan_file(made / "plan.json"), tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text().count("ffn_down_exps") >= 1
    with pytest.raises(InputError, match=r"\.png, \.svg or \.pdf"):
        draw(read_plan_file(made / "plan.json"), tmp_path / "plan.txt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sensitivity", "x"], "--sensitivity has no effect without --size or --target"),
        (["--size", "5MB", "--type", "Q4_K_M"], "--type has no effect with a plan"),
        (["--target-context", "512"], "--target-context has no effect without --target"),
        (["--size", "5MB", "--target", "24GB+96GB"], "expected one of them"),
        (["--size", "5MB", "--dry-run"], "needs --sensitivity"),
        (["--target", "24GB+lots", "--target-context", "512"], "--target 24GB\\+lots"),
    ],
)
def test_words_that_contradict_each_other_are_refused(
    model: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        CliRunner().invoke(
            gguf_command, ["--model", str(model), "--out", str(tmp_path / "out"), *arguments], catch_exceptions=False
        )
