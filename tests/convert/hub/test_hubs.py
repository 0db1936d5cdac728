"""A hub is one module and one row: nothing else tells hubs apart, and the manifest's schema knows every row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from helpers.paths import SOURCE
from mmquant.convert.files.schemas import schema
from mmquant.convert.hub.address import parse_address
from mmquant.convert.hub.http import HubError
from mmquant.convert.hub.hubs import DEFAULT_HUB, HUBS, endpoint_of, parse_spec

ROOMS = ("mmquant", "commands", "runs", "calibration", "convert", "quantize")
OWN = {SOURCE / "convert" / "hub" / name for name in ("huggingface.py", "modelscope.py")}
KEYS = "|".join(re.escape(word) for hub in HUBS.values() for word in (hub.key, hub.manifest_name))
TELLS = re.compile(rf"(?:{KEYS}):?|.*\((?:\?:)?(?:{'|'.join(HUBS)})[|)].*")
PRODUCT = [
    path
    for room in ROOMS
    for path in sorted((SOURCE / room).rglob("*.py"))
    if path not in OWN and "data" not in path.parts
]


def words(text: str) -> list[tuple[int, str]]:
    """(line, constant) of every string that names a hub."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return [(n.lineno, n.value) for n in nodes if isinstance(n.value, str) and TELLS.fullmatch(n.value)]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_tells_hubs_apart(path: Path) -> None:
    assert not words(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "code",
    ['x == "hf"', 'f"hf:{repo}"', '{"ms": 1}', 're.compile(r"(hf|ms):(.+)")', 'x in ("huggingface",)'],
)
def test_the_test_sees_it(code: str) -> None:
    assert words(code)


def test_the_schema_knows_every_hub() -> None:
    found = schema("fit")
    names = {hub.manifest_name for hub in HUBS.values()}
    blocks = [node for node in walk(found) if isinstance(node, dict)]
    sources = [b["source"]["enum"] for b in blocks if isinstance(b.get("source"), dict) and "enum" in b["source"]]
    repositories = [b["repo"]["properties"] for b in blocks if isinstance(b.get("repo"), dict)]
    assert [set(s) for s in sources] == [names | {"local"}]
    assert repositories
    assert all(names <= set(r) for r in repositories)


def walk(value: object) -> list[object]:
    """The value and everything inside it."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(found for item in inside for found in walk(item))]


BAD_SITES = ["http://[::1", "https://h:99999", "https://h\n/x", "ftp://x", "x", "https://h?x=y", "https://me:secret@h"]


@pytest.mark.parametrize("url", BAD_SITES)
def test_a_site_is_checked_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for key, hub in HUBS.items():
        monkeypatch.setenv(hub.endpoint_variable, url)
        if url == "x" and hub.bare_host:  # ModelScope's own client takes a host alone
            assert endpoint_of(key).url == "https://x"
            continue
        with pytest.raises(HubError, match=f"{hub.endpoint_variable} is .*, expected an address") as caught:
            endpoint_of(key)
        assert "secret" not in str(caught.value)
        parse_address("https://huggingface.co/org/name")


def test_a_stored_login_that_is_no_text_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for path in (tmp_path / "token", tmp_path):  # no UTF-8; a folder
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
        with pytest.raises(HubError, match="the stored login of Hugging Face cannot be read"):
            endpoint_of("hf")


def test_every_row_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, hub in HUBS.items():
        assert key == hub.key
        assert hub.endpoint.endswith(hub.hosts[0])
        monkeypatch.setenv(hub.token_variable, "secret")
        monkeypatch.setenv(hub.endpoint_variable, "https://hub.example")
        endpoint = endpoint_of(key)
        assert (endpoint.url, endpoint.token) == ("https://hub.example", "secret")
        assert "secret" not in repr(endpoint)
        spec = parse_spec(f"{key}:org/name")
        assert spec.revision == hub.branch
        assert "org/name" in hub.file_url("https://hub.example", spec, "x.json")
        assert hub.page_url(hub.endpoint, "org/name").startswith(hub.endpoint)
    assert DEFAULT_HUB in HUBS.values()
