"""What a run needs and what it refuses: limits, disk, machines, plans; and its dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.run_cases import alone, artifacts, digests, model, recipe
from mmquant.convert import manifest
from mmquant.errors import FitError, InputError
from mmquant.runs.gguf import quantize_gguf
from mmquant.runs.options import GgufOptions
from mmquant.runs.recipe.read import Recipe, parse_recipe
from mmquant.runs.run import run
from mmquant.runs.status import status
from mmquant.runs.watch import resident

FP8 = "\n  fp8: {command: fp8}\n  rtn: {command: gguf, type: Q8_0}\n"
CHECK = "check: {windows: 2, context: 32}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=2)


def wanted(source: Path, more: str) -> Recipe:
    return recipe(source, FP8, more)


@pytest.mark.parametrize(
    "limit, text",
    [
        ("disk: 1MB", "limits.disk 1,000,000: artifacts, shards and hidden states take 6,"),
        ("ram: 1MB", "limits.ram 1,000,000: one dequantized layer and what it passes on take "),
    ],
)
def test_what_cannot_do_is_refused_beforehand(source: Path, tmp_path: Path, limit: str, text: str) -> None:
    chosen = wanted(source, f"{CHECK}limits: {{{limit}}}\n")
    planned = run(chosen, tmp_path / "run", device="cpu", dry_run=True)
    assert str(planned.refusal).startswith(text)
    assert not (tmp_path / "run").exists()
    with pytest.raises(FitError) as found:
        run(chosen, tmp_path / "run", device="cpu")
    assert str(found.value) == str(planned.refusal)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_memory_that_grows_past_its_limit_ends_the_run(source: Path, tmp_path: Path) -> None:
    """And the same command goes on where more is allowed."""
    limit = resident() // 2
    with pytest.raises(FitError, match=r"limits.ram .* bytes in use after fp8, embeddings; run again with more"):
        run(wanted(source, f"limits: {{ram: {limit}}}\n"), tmp_path / "run", device="cpu")
    assert status(tmp_path / "run").state == "stopped"
    run(wanted(source, ""), tmp_path / "run", device="cpu")
    run(wanted(source, ""), tmp_path / "whole", device="cpu")
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")


def test_machines_stand_in_summary_and_manifest(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "machines.yaml"
    file.write_text("targets:\n  - {id: toy, card: 24GB, ram: 32GB}\n  - {id: mite, ram: 5GB, reserved: 4999MB}\n")
    machines = f"fit: {{targets: [toy, 24GB+96GB], machines: {file}, context: 64}}\n"
    made = run(wanted(source, machines), tmp_path / "run", device="cpu")
    shown = [line.split() for line in made.lines()]
    assert ["fits", "toy", "24GB+96GB"] in shown
    assert ["fp8", "yes,", "64", "yes,", "64"] in shown
    for name in ("fp8", "rtn"):
        found = manifest.read(tmp_path / "run" / name)
        assert found is not None
        assert [(t["id"], t["context_tokens"]) for t in found["targets"][:2]] == [("toy", 64), ("24GB+96GB", 64)]
        assert len({t["id"] for t in found["targets"]}) == len(found["targets"]) > 10
        assert "| toy |" in (tmp_path / "run" / name / "FIT.md").read_text()
    with pytest.raises(FitError, match=r"fit.targets mite: no variant fits; nearest "):
        run(wanted(source, machines.replace("24GB+96GB", "mite")), tmp_path / "none", device="cpu")


def test_errors_that_the_model_shows_name_their_line(source: Path, tmp_path: Path) -> None:
    lines = f"model: {source}\nvariants:\n  a: {{command: fp8}}\n  b: {{command: gguf, tensor_type: 'x='}}\n"
    for text, found in {
        lines: "r.yaml:4: variants.b: ",
        lines.replace("tensor_type: 'x='", "text: none.txt"): "r.yaml:4: variants.b: none.txt: ",
        lines.replace("gguf, tensor_type: 'x='", "fp8, scheme: native"): "r.yaml:4: variants.b: scheme native",
        lines.replace("gguf, tensor_type: 'x='", "int4, plan: none.json"): "r.yaml:4: variants.b: ",
    }.items():
        with pytest.raises(InputError) as error:
            run(parse_recipe(text, "r.yaml"), tmp_path / "run", device="cpu")
        assert str(error.value).startswith(found)


@pytest.mark.slow
def test_a_variant_of_a_size_is_planned_first(source: Path, tmp_path: Path) -> None:
    """Byte for byte what its own command writes; a second one uses the same measurement."""
    options = "command: gguf, size: 1100KB, judged_windows: 1"
    chosen = recipe(source, f"\n  small: {{{options}}}\n  large: {{{options.replace('1100KB', '1500KB')}}}\n")
    dry = run(chosen, tmp_path / "run", device="cpu", dry_run=True)
    assert [(row["label"], row["bytes"]) for row in dry.rows()] == [("planned", 1_100_000), ("planned", 1_500_000)]
    assert dry.needs is not None
    assert dry.needs.output == 2_600_000
    run(chosen, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "large" / ".mmquant.plan" / "sensitivity.json").exists()
    own = chosen.variants[0].options
    assert isinstance(own, GgufOptions)
    quantize_gguf(source, tmp_path / "alone", own, device="cpu")
    assert digests(tmp_path / "run" / "small") == digests(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "command: int4, group_size: 32, size: 4400KB",
        "command: nvfp4, size: 4400KB",
        "command: mxfp4, size: 4400KB",
        "command: mlx, size: 3MB",
        "command: int4, target: 2xa100-80gb, target_context: 256",
        "command: nvfp4, target: 2xa100-80gb, target_context: 256",
        "command: mlx, target: mac-128gb, target_context: 256",
        "command: gguf, target: 24GB+64GB, target_context: 256",
    ],
)
def test_every_command_is_planned_for_a_size_or_a_machine(source: Path, tmp_path: Path, options: str) -> None:
    """Byte for byte what its own command writes, no larger than asked for."""
    chosen = recipe(source, f"\n  a: {{{options}, judged_windows: 1}}\n")
    run(chosen, tmp_path / "run", device="cpu")
    (tmp_path / "alone").mkdir()
    alone(chosen, tmp_path / "alone")
    found = digests(tmp_path / "run" / "a")
    assert found
    assert found == digests(tmp_path / "alone" / "a")
    size, weights = (
        getattr(chosen.variants[0].options, "size", None),
        (tmp_path / "run" / "a").glob("model-*.safetensors"),
    )
    assert size is None or sum(path.stat().st_size for path in weights) <= size


def test_other_texts_make_again_what_they_made(source: Path, tmp_path: Path) -> None:
    """The recipe is the same, the file that it names is not."""
    text = tmp_path / "text.md"
    text.write_text("One two three. " * 300)
    lines = f"model: {source}\nvariants:\n  q: {{command: gguf, type: Q4_0, effort: fast, text: {text}, windows: 2, "
    chosen = parse_recipe(lines + "context: 32, text_only: true}\n", "r.yaml")
    run(chosen, tmp_path / "run", device="cpu")
    text.write_text("Four five six seven. " * 300)
    (tmp_path / "run" / "mmquant-run.json").write_text(
        (tmp_path / "run" / "mmquant-run.json").read_text().replace('"written"', '"writing"')
    )
    with pytest.raises(InputError, match=r"r.yaml:3: variants.q: .*or --replace makes it again"):
        run(chosen, tmp_path / "run", device="cpu")
    run(chosen, tmp_path / "run", device="cpu", replace=True)
    run(chosen, tmp_path / "whole", device="cpu")
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")
