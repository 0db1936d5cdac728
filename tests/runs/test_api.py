"""The Python API: what it offers, that it needs no click, and that its options are the command line's."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import mmquant
from mmquant.commands.cli import COMMANDS
from mmquant.convert.hub.hubs import DEFAULT_HUB, HUBS
from mmquant.convert.hub.store import FetchOptions
from mmquant.errors import InputError
from mmquant.monitor import Bar
from mmquant.runs.options import Bf16Options, CalibrateOptions, Fp8Options, GgufOptions, Int4Options, PlanOptions
from mmquant.runs.options_use import DoctorOptions, EvalOptions, PullOptions, PushOptions

OPTIONS = {
    "fp8": Fp8Options,
    "bf16": Bf16Options,
    "int4": Int4Options,
    "gguf": GgufOptions,
    "calibrate": CalibrateOptions,
    "eval": EvalOptions,
    "doctor": DoctorOptions,
    "plan": PlanOptions,
    "pull": PullOptions,
    "push": PushOptions,
}


def command_of(name: str) -> click.Command:
    return importlib.import_module(f"mmquant.commands.{name}").command


@pytest.mark.parametrize("name", mmquant.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(mmquant, name)
    assert name in dir(mmquant)
    if name != "__version__":
        assert inspect.getdoc(value), name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantize_nothing'"):
        mmquant.quantize_nothing  # type: ignore[attr-defined]  # noqa: B018


def test_functions_take_the_options_of_their_command() -> None:
    names = {"bf16": "dequantize_bf16", "eval": "evaluate"}
    names |= {command: f"quantize_{command}" for command in ("fp8", "int4", "gguf")}
    for command, options in OPTIONS.items():
        function = getattr(mmquant, names.get(command, command))
        assert options.__name__ in str(inspect.signature(function).parameters["options"].annotation), command
    assert not set(OPTIONS) - set(COMMANDS)


SEVERAL = ("group_size", "type")  # one command line writes several; the options of a run hold one


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_are_those_of_the_command_line(name: str) -> None:
    """Every field is an option of its command, and what click makes of its default is the default of the field."""
    command, defaults = command_of(name), OPTIONS[name]()
    typed = {"eval": ["x"], "doctor": ["x"], "push": [".", "--repo", "a/b"], "pull": ["--out", "x"]}
    given = command.make_context(name, typed.get(name, ["--out", "x"])).params
    skipped = {"text_only"} if name == "calibrate" else set()
    for field in dataclasses.fields(defaults):
        if field.name in skipped:
            continue
        found = given[field.name]
        if field.name in SEVERAL and isinstance(found, tuple):
            (found,) = found
        found = int(found) if isinstance(getattr(defaults, field.name), int) and isinstance(found, str) else found
        assert found == getattr(defaults, field.name), field.name


def test_fetching_has_the_defaults_of_the_command_line() -> None:
    given = command_of("fp8").make_context("fp8", ["--out", "x"]).params
    for name in ("max_disk", "max_shards", "keep_shards", "transport"):
        assert given[name] == getattr(FetchOptions(), name)


def test_hubs_are_those_of_the_table() -> None:
    field = next(f for f in dataclasses.fields(PushOptions) if f.name == "hub")
    assert field.metadata["choices"] == tuple(HUBS)
    assert field.default == DEFAULT_HUB.key


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Int4Options(format="gguf"), "--format gguf: expected one of compressed-tensors, awq, gptq"),
        (lambda: Int4Options(group_size=7), "--group-size 7: expected one of 32, 64, 128, -1"),
        (lambda: Int4Options(windows=0), "--windows 0: expected 1 or more"),
        (lambda: GgufOptions(seed=2**32), "--seed 4294967296: expected 0 to 4294967295"),
        (lambda: Int4Options(method="rtn", effort="high"), "rounding to nearest is not refined"),
        (lambda: GgufOptions(statistics=Path("s"), no_calibration=True), "contradicts --no-calibration"),
        (lambda: DoctorOptions(fix=True), "--fix: needs --statistics or --text"),
        (lambda: CalibrateOptions(imatrix=Path("x.dat")), "ending in .gguf"),
    ],
)
def test_wrong_options_are_one_line(make: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value)


class Recorder:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: dict[str, list[int]] = {}
        self.messages: list[str] = []

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        self.phases[phase] = [done, total or 0, 0]
        return RecordedBar(self.phases[phase])

    def message(self, text: str) -> None:
        self.messages.append(text)


class RecordedBar:
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def advance(self, count: int = 1) -> None:
        self.seen[0] += count

    def expect(self, total: int) -> None:
        self.seen[1] = total

    def finish(self) -> None:
        self.seen[2] += 1


def test_a_run_reports_to_its_monitor_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    watcher = Recorder()
    found = mmquant.quantize_fp8("demo", tmp_path / "fp8", Fp8Options(scheme="channel"), monitor=watcher)
    assert found.path == tmp_path / "fp8"
    assert watcher.phases == {"FP8-channel": [6, 6, 1]}  # embeddings, four layers, the rest; finished once
    result = mmquant.evaluate(found.path, "demo", EvalOptions(windows=2, context=32), monitor=watcher)
    assert result is not None
    assert watcher.phases["eval"][0] == watcher.phases["eval"][1] > 0
    again = mmquant.quantize_fp8("demo", tmp_path / "again")
    assert again.manifest()["artifacts"][0]["quant_label"] == "FP8-block"
    assert capfd.readouterr() == ("", "")


def test_a_dry_run_says_what_would_stop_it(tmp_path: Path) -> None:
    plan = mmquant.quantize_int4("demo", tmp_path / "new", Int4Options(group_size=32), dry_run=True)
    assert plan.dry_run
    assert plan.refusal is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").touch()
    plan = mmquant.quantize_int4("demo", tmp_path / "full", Int4Options(group_size=32), dry_run=True)
    assert "holds letter" in str(plan.refusal)
    assert plan.bytes > 0


def test_results_are_tables(tmp_path: Path) -> None:
    census = mmquant.inspect("demo")
    assert json.loads(json.dumps(census.to_dict()))["bytes"] == sum(row["bytes"] for row in census.rows())
    assert census._repr_html_().count("<tr>") == len(census.kinds) + 1
    try:
        importlib.import_module("pandas")
    except ImportError:
        with pytest.raises(InputError, match="pip install pandas"):
            census.to_frame()
    else:
        assert list(census.to_frame()["kind"]) == [kind.kind for kind in census.kinds]


def test_html_shows_text_as_text() -> None:
    census = dataclasses.replace(mmquant.inspect("demo"), kinds=[])
    assert census._repr_html_() == "<em>nothing</em>"
    from mmquant.convert.checkpoints.census import Kind

    hostile = dataclasses.replace(census, kinds=[Kind("<script>", "BF16", 1, 2, 3)])
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


def test_the_api_needs_no_click() -> None:
    """Every public function can be had where click cannot be imported at all."""
    code = "import sys; sys.modules['click'] = None; import mmquant; [getattr(mmquant, n) for n in mmquant.__all__]; "
    code += "print(mmquant.inspect('demo').parameters)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_types_are_shipped() -> None:
    assert (Path(mmquant.__file__).parent / "py.typed").is_file()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/api.md as a doctest: every example, in order."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "api.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8")
    assert (failed, tried > 20) == (0, True)
