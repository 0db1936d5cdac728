"""The table of hubs, and the functions that pick a row of it. A new hub is one module and one row here."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from mmquant.errors import InputError

from ..files.parse import one_line, path_fault, short
from . import huggingface, modelscope
from .http import Client, Endpoint, HubError
from .interface import Hub
from .listing import Listing, RepoSpec
from .remote import Remote

HUBS: dict[str, Hub] = {hub.key: hub for hub in (huggingface.HUB, modelscope.HUB)}
DEFAULT_HUB = huggingface.HUB
BY_MANIFEST_NAME = {hub.manifest_name: hub for hub in HUBS.values()}
KEYS = "|".join(HUBS)  # inside a regular expression
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
SPEC = re.compile(rf"({KEYS}):({NAME.pattern})(?:@(.+))?", re.ASCII)


def expected(form: str) -> str:
    """How a repository is written on every hub: `hf:ORG/NAME or ms:ORG/NAME`, where `form` is what follows the key."""
    return " or ".join(f"{key}:{form}" for key in HUBS)


def parse_spec(text: str) -> RepoSpec:
    """A source such as hf:ORG/NAME@REV; InputError when it is malformed."""
    match = SPEC.fullmatch(text)
    revision_fault = path_fault(match[3]) if match and match[3] else None
    if not match or ".." in match[2] or revision_fault:
        raise InputError(f"{text}: expected {expected('ORG/NAME[@REV]')}")
    return RepoSpec(match[1], match[2], match[3] or HUBS[match[1]].branch)


def check_site(hub: Hub, url: str) -> None:
    """HubError unless this is a hub's address: http or https, a host, no user's name, query or control characters."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port beyond 65535, an open bracket
        good = False
    if not good or not url.isprintable() or any(c in url for c in "@?# "):
        shown = short(url.rpartition("@")[2])  # what stands before may be a password
        raise HubError(f"{hub.endpoint_variable} is {shown}, expected an address such as {hub.endpoint}")


def endpoint_of(key: str) -> Endpoint:
    """The endpoint and token of a hub, read now from where its own client keeps them. HubError when they are none."""
    hub = HUBS[key]
    named = os.environ.get(hub.endpoint_variable) or hub.endpoint
    check_site(hub, f"https://{named}" if hub.bare_host and "://" not in named else named)  # before its client reads it
    try:
        url, token = hub.account()
    except (OSError, ValueError) as error:
        raise HubError(f"the stored login of {hub.name} cannot be read ({one_line(error)}): log in again") from None
    check_site(hub, url)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        secret = hub.token_variable
        raise HubError(f"{secret} (or the stored login) holds blanks or letters that no token has, copy it again")
    return Endpoint(hub, url.rstrip("/"), token)


def list_repo(client: Client, spec: RepoSpec) -> Listing:
    """Resolve the revision once and list that commit.

    Raises HubError for an unknown repository or revision or missing access, TransferError when the hub does not answer.
    """
    return HUBS[spec.hub].list_files(client, spec)


def file_url(endpoint: str, spec: RepoSpec, path: str) -> str:
    """Where a file of a repository is read."""
    return HUBS[spec.hub].file_url(endpoint, spec, path)


def remote_of(client: Client, repo: str, revision: str | None) -> Remote:
    """The repository ORG/NAME on the client's hub, to write to; None is its usual branch."""
    hub = client.endpoint.hub
    branch = revision or hub.branch
    return hub.repository(client, RepoSpec(hub.key, repo, hub.renamed_branches.get(branch, branch)))
