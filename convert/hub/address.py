"""Parse what a user types for a model: a path, hf:ORG/NAME[@REV][:TYPE], ms:..., or a hub's URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mmquant.errors import InputError

from .hubs import DEFAULT_HUB, HUBS, KEYS, NAME, expected

HOSTS = {host: hub.key for hub in HUBS.values() for host in hub.hosts}
OTHERS = ("datasets", "spaces", "docs", "blog", "papers", "collections", "api", "studios", "organization")
EXPECTED = f"expected {expected('ORG/NAME[@REV][:TYPE]')}"
_SPEC = re.compile(rf"({KEYS}):(?://)?([^:@]+)(?:@([^:]+))?(?::([\w-]+))?(?:@([^:]+))?/?", re.ASCII | re.IGNORECASE)
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?([\w.-]+(?::\d+)?)/(.+)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """A place on this machine, or a repository: `spec` hf:ORG/NAME[@REV], `kind` the GGUF type that is asked for."""

    path: Path | None = None
    spec: str | None = None
    kind: str | None = None


def parse_address(text: str) -> Address:
    """What is meant. InputError for a repository's name without its hub, and for addresses of something else."""
    if text.lower().startswith(tuple(f"{key}:" for key in HUBS)):
        return _repository(text)
    if Path(text).exists():
        return Address(path=Path(text))
    address = _ADDRESS.fullmatch(text)
    hub = _hub_of(address[1]) if address else None
    if address and hub:
        return _page(text, hub, address[2])
    if re.match(r"https?://", text, re.IGNORECASE):
        hosts = " or ".join(hub.hosts[0] for hub in HUBS.values())
        raise InputError(f"{text}: not an address of {hosts}, {EXPECTED} or a folder")
    if NAME.fullmatch(text) and not text.startswith("."):
        others = ", ".join(f"{hub.key}:{text} on {hub.name}" for hub in HUBS.values() if hub != DEFAULT_HUB)
        raise InputError(f"{text}: no such folder; a repository is {DEFAULT_HUB.key}:{text} (or {others})")
    return Address(path=Path(text))


def is_repository(text: str) -> bool:
    """Whether a model's name means a hub's repository; InputError as parse_address."""
    return parse_address(text).spec is not None


def _hub_of(host: str) -> str | None:
    endpoints = {hub.key: os.environ.get(hub.endpoint_variable, "") for hub in HUBS.values()}
    own = {url.partition("//")[2].split("/")[0].lower(): hub for hub, url in endpoints.items() if "//" in url}
    return {**HOSTS, **own}.get(host.lower())


def _repository(text: str) -> Address:
    inner = text.partition(":")[2].lstrip("/")
    if re.match(r"https?:", inner, re.IGNORECASE):
        return parse_address(inner)
    match = _SPEC.fullmatch(text.rstrip("/"))
    if not match or not NAME.fullmatch(match[2]) or ".." in match[2] or (match[3] and match[5]):
        raise InputError(f"{text}: {EXPECTED}")
    return _address(match[1].lower(), match[2], match[3] or match[5], match[4])


def _address(hub: str, repo: str, revision: str | None, kind: str | None = None) -> Address:
    return Address(spec=f"{hub}:{repo}" + (f"@{revision}" if revision else ""), kind=kind)


def _page(text: str, hub: str, rest: str) -> Address:
    """ORG/NAME[/tree/REV] of Hugging Face, models/ORG/NAME[/...] of ModelScope; of a file its repository."""
    parts = [unquote(part) for part in rest.split("?")[0].split("#")[0].split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    repo = "/".join(parts[:2])
    if (parts[:1] and parts[0] in OTHERS) or not NAME.fullmatch(repo) or ".." in repo:
        raise InputError(f"{text}: not the address of a model, {EXPECTED}")
    if len(parts) > 3 and parts[2] in ("blob", "resolve", "raw"):
        raise InputError(f"{text}: the address of a file, expected the repository: {hub}:{repo}@{parts[3]}")
    if len(parts) > 4 and parts[2] == "tree":
        raise InputError(f"{text}: the address of a folder, expected the repository: {hub}:{repo}@{parts[3]}")
    return _address(hub, repo, parts[3] if len(parts) > 3 and parts[2] == "tree" else None)
