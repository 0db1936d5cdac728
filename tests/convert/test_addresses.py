"""Addresses of models are parsed, and models are named after their repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmquant.convert.checkpoints.store import LocalFolder
from mmquant.convert.hub.address import parse_address
from mmquant.convert.hub.http import HubError
from mmquant.convert.hub.hubs import endpoint_of
from mmquant.convert.naming import short_name
from mmquant.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "spec", "kind"),
    [
        ("hf:org/name", "hf:org/name", None),
        ("HF:org/name/", "hf:org/name", None),
        ("hf:org/name@v1", "hf:org/name@v1", None),
        ("hf:org/name:Q4_K_M", "hf:org/name", "Q4_K_M"),
        ("hf:org/name@main:UD-Q4_K_XL", "hf:org/name@main", "UD-Q4_K_XL"),
        ("hf:org/name:Q8_0@main", "hf:org/name@main", "Q8_0"),
        ("https://huggingface.co/org/name", "hf:org/name", None),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "hf:org/name@refs/pr/1", None),
        ("http://www.huggingface.co/org/name/tree/main?x=1#top", "hf:org/name@main", None),
        ("huggingface.co/org/name", "hf:org/name", None),
        ("https://hf.co/org/name/", "hf:org/name", None),
        ("hf:https://huggingface.co/org/name", "hf:org/name", None),
        ("https://modelscope.cn/models/org/name", "ms:org/name", None),
        ("https://www.modelscope.cn/models/org/name/files", "ms:org/name", None),
    ],
)
def test_repositories(text: str, spec: str, kind: str | None) -> None:
    found = parse_address(text)
    assert (found.spec, found.kind, found.path) == (spec, kind, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("org/name", "hf:org/name"),
        ("MiniMaxAI/MiniMax-M2.7", "hf:MiniMaxAI/MiniMax-M2.7"),
        ("https://example.org/org/name", "hf:ORG/NAME"),
        ("https://huggingface.co/datasets/org/name", "not the address of a model"),
        ("https://huggingface.co/org", "not the address of a model"),
        ("https://huggingface.co/org/name/blob/main/x.gguf", "hf:org/name@main"),
        ("hf:name", "hf:ORG/NAME"),
        ("hf:org/../name", "hf:ORG/NAME"),
    ],
)
def test_what_is_answered_with_a_hint(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_address(text)
    assert said in str(error.value)


def test_a_folder_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_address("org/name").path == Path("org/name")


@pytest.mark.parametrize("value", ["hf-mirror.com", "htps://hf-mirror.com", "https://", "localhost:8080"])
def test_an_endpoint_that_is_no_address(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        endpoint_of("hf")


@pytest.mark.parametrize("token", ["ключ", "hf_a b", "hf_\u201cx\u201d"])
def test_a_token_that_is_none(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="HF_TOKEN") as error:
        endpoint_of("hf")
    assert token not in str(error.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"hub/models--MiniMaxAI--MiniMax-M2.7/snapshots/{COMMIT}", "MiniMax-M2.7"),
        (f"hub/models--MiniMaxAI--MiniMax-M2.7/snapshots/{COMMIT}/", "MiniMax-M2.7"),
        (f"hub/models--a--b--c/snapshots/{COMMIT}/Q4_K_M", "b--c"),
        ("modelscope/hub/models/MiniMax/MiniMax-M2___7", "MiniMax-M2.7"),
        ("plain/m27", "m27"),
        ("plain/m27/.", "m27"),
        (f"hf:MiniMaxAI/MiniMax-M2.7@{COMMIT}:Q8_0", "MiniMax-M2.7"),
    ],
)
def test_names(path: str, name: str) -> None:
    assert short_name(path) == name


def test_a_snapshot_names_repository_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--MiniMaxAI--MiniMax-M2.7" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for place in (folder, tmp_path / "link", Path(".")):
        origin = LocalFolder(place).origin
        assert (origin.hub, origin.repo, origin.revision) == ("hf", "MiniMaxAI/MiniMax-M2.7", COMMIT)
