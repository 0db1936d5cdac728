"""Recipes: what is wrong is named with its line and key; what is right becomes the commands' options."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

import mmquant
from mmquant.errors import InputError
from mmquant.runs.options import GgufOptions, Int4Options
from mmquant.runs.recipe.read import parse_recipe
from mmquant.runs.recipe.schema import recipe_schema
from mmquant.runs.recipe.templates import PURPOSES, template

A = "model: demo\nvariants:\n  a: "
BASE = A + "{command: int4}\n"
TWO = "model: demo\ncorpora: {main: {}, other: {}}\nvariants:\n  a: "

WRONG = {
    "modle: demo\nvariants: {a: {command: fp8}}": "r.yaml:1: modle: unknown key; did you mean model?",
    "model: demo": "r.yaml:1: variants is missing",
    "model: demo\nvariants: {}": "r.yaml:2: variants: empty, expected a variant",
    A + "{command: fp9}": "r.yaml:3: variants.a.command: 'fp9', expected fp8 or bf16 or int4",
    A + "\n    command: int4\n    group_size: 48": "r.yaml:5: variants.a.group_size: 48, expected 32",
    A + "\n    command: fp8\n    group_size: 32": "r.yaml:5: variants.a.group_size: unknown key",
    A + "{type: Q4_K_M}": "r.yaml:3: variants.a: command is missing",
    "model: demo\nvariants:\n  a/b: {command: fp8}": "r.yaml:2: variants: 'a/b', 'a/b' does not match",
    A + "{command: int4, windows: no}": "r.yaml:3: variants.a.windows: False, expected integer",
    A + "{command: int4, windows: 0}": "r.yaml:3: variants.a.windows: 0, expected at least 1",
    A + "{command: fp8, max_shard_size: 5XB}": "r.yaml:3: variants.a.max_shard_size: '5XB', expec",
    A + "{command: int4, method: rtn, effort: high}": "r.yaml:3: variants.a: --effort high",
    A + "{command: fp8}\n  a: {command: int4}": "r.yaml:2: variants: 'a' stands twice",
    A + "{command: fp8": "r.yaml:3: not YAML",
    "- model": "r.yaml:1: expected keys such as model and variants",
    BASE + "corpora: {m: {}, n: {}}\nvariants2: 1": "r.yaml:5: variants2: unknown key; did you mean variants?",
    TWO + "{command: int4, corpus: mian}": "r.yaml:4: variants.a.corpus",
    BASE + "check: {gates: {max_kdl: 1}}": "r.yaml:4: check.gates.max_kdl: unknown key; did you mean max_kld?",
    BASE + "push:\n  - {repo: me/a, variants: [b]}": "r.yaml:5: push.0.variants.0: 'b'; ",
    BASE + "push:\n  - {hub: hf}": "r.yaml:5: push.0: repo is missing",
    BASE + "revision: abc": "r.yaml:4: revision: model is 'demo', expected hf:ORG/NAME",
    BASE + "push:\n  - {repo: me}": "r.yaml:5: push.0.repo: 'me', expected ORG/NAME",
    BASE + "push:\n  - {repo: me/a, hub: git}": "r.yaml:5: push.0.hub: 'git', expected hf or ms",
    BASE + "fit: {}": "r.yaml:4: fit: targets is missing",
    BASE + "fit:\n  targets: [24GB+96GB,\n   2xA10]": "r.yaml:6: fit.targets.1: --target 2xA10: unknown",
    BASE + "fit: {targets: [24GB], context: 0}": "r.yaml:4: fit.context: 0, expected at least 1",
    BASE + "fit: {targets: [24GB], machines: none.yaml}": "r.yaml:4: fit.machines: --targets none.yaml: ",
    A + "{command: calibrate}\npush:\n  - {repo: me/a, variants: [a]}": "r.yaml:5: push.0.variants.0: 'a'; ",
    A + "{command: int4, plan: p, size: 1GB}": "r.yaml:3: variants.a: --plan, --size, --target: expected one",
    BASE + "check: {gates: {max_kld: .nan}}": "r.yaml:4: check.gates.max_kld: nan, expected a finite number",
    BASE + "limits: {ram: .inf}": "r.yaml:4: limits.ram: inf, expected a finite number",
    "model: !!python/object:os.system x": "r.yaml:1: model: 'x' as 'python/object:os.system', expected a plain value",
    "model: demo\nvariants:\n  mmquant-run.json: {command: fp8}": "r.yaml:3: variants.mmquant-run.json: a file",
    "model: !!int ''": "r.yaml:1: model: '' as 'int', expected a plain value",
    "model: !!bool x": "r.yaml:1: model: 'x' as 'bool', expected a plain value",
    BASE + "limits: {disk: 0}": "r.yaml:4: limits.disk: 0, expected at least 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_faults_name_line_and_key(text: str) -> None:
    with pytest.raises(InputError) as found:
        parse_recipe(text, "r.yaml")
    assert str(found.value).startswith(WRONG[text])


def test_bombs_are_refused() -> None:
    lines = ["a: &a [x, x]"] + [f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20)]
    with pytest.raises(InputError, match=r"r.yaml:2: anchors and aliases are not read"):
        parse_recipe("\n".join(lines), "r.yaml")
    with pytest.raises(InputError, match=r"nested|not YAML"):
        parse_recipe("model: " + "[" * 500 + "]" * 500, "r.yaml")


def test_values_become_options() -> None:
    found = parse_recipe(
        "model: hf:a/b\nrevision: 2026-01-01\ncorpora: {main: {text: t.txt, windows: 8}}\nvariants:\n"
        "  a: {command: int4, group_size: 32, windows: 9, max_shard_size: 1GB}\n"
        "  b: {command: gguf, type: Q2_K, plan: p.json, gates: {max_kld: 2}}\n"
        "check: {windows: 3, gates: {max_kld: 1}}\n",
        "r.yaml",
    )
    assert found.model == "hf:a/b@2026-01-01"
    a, b = found.variants
    assert a.options == Int4Options(text=("t.txt",), windows=9, group_size=32, max_shard_size=10**9)
    assert b.options == GgufOptions(text=("t.txt",), windows=8, type="Q2_K", plan=Path("p.json"))
    assert (b.gates, found.gates) == ({"max_kld": 2.0}, {"max_kld": 1.0})
    assert found.check is not None
    assert found.check.windows == 3


@pytest.mark.parametrize("file", ["recipe.yaml", "r", "a-much-longer-name.yaml", "two words.yaml", "\n", "\udcff.yaml"])
def test_the_head_of_a_template_is_aligned_for_any_name(file: str) -> None:
    lines = template(file=file).splitlines()[1:4]
    assert all(line.startswith("#   mmquant ") for line in lines)
    assert len({re.search(" {3,}(?=what it|run again|how far)", line).end() for line in lines}) == 1  # type: ignore[union-attr]
    typed = shlex.split(lines[0].strip("# "))
    assert typed[:3] == ["mmquant", "run", file if file.isprintable() else "RECIPE"]
    assert template(file=file).splitlines()[4:] == template().splitlines()[4:]


@pytest.mark.parametrize("purpose", [None, *PURPOSES])
def test_templates_are_recipes(purpose: str | None) -> None:
    text = template(purpose)
    assert parse_recipe(text, "r.yaml").variants
    assert parse_recipe(
        text.replace("# revision: COMMIT", "revision: abc").replace("# device", "device"), "r.yaml"
    ).device


def test_the_schema_is_one(tmp_path: Path) -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    jsonschema.validate(yaml.safe_load(template()), schema)


def test_the_schema_is_shipped() -> None:
    path = Path(mmquant.__file__).parent / "data" / "schema" / "mmquant-recipe-1.schema.json"
    assert json.loads(path.read_text()) == recipe_schema()
