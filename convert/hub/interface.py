"""What the rest of the program asks of a hub: one frozen row of facts and functions per hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .http import Client
    from .listing import Listing, RepoFile, RepoSpec
    from .remote import Remote

Transport = Callable[["Client", "RepoSpec", "RepoFile", Path, float], bool]


def _nothing(token: str) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Hub:
    """One hub. `hubs.HUBS` has them by `key`; nothing else tells hubs apart.

    Raised by the functions: HubError for what the user can put right, TransferError for the network and the hub.
    """

    key: str  # before the colon of KEY:ORG/NAME
    name: str  # as people read it
    manifest_name: str  # in mmquant.fit.json, where the schema must have it too
    hosts: tuple[str, ...]  # of its pages; the first one is the one that errors name
    endpoint: str  # address of its API
    endpoint_variable: str  # environment: another endpoint
    token_variable: str  # environment: the token
    login: str  # command that stores a token
    offline_variable: str | None  # environment: do not reach it
    page: str  # between the endpoint and ORG/NAME in the address of a page
    branch: str  # what a repository without a revision means
    download: str  # command that a card shows, before ORG/NAME
    account: Callable[[], tuple[str, str | None]]  # -> (endpoint, token), from where its own client keeps them
    list_files: Callable[[Client, RepoSpec], Listing]  # resolves the revision, lists that commit
    file_url: Callable[[str, RepoSpec, str], str]  # (endpoint, repository, path)
    candidates: Callable[[RepoSpec, RepoFile], list[Path]]  # where its client's cache would have a file
    cached_repository: Callable[[str], tuple[str, str] | None]  # path in that cache -> (ORG/NAME, commit or "")
    offline_listing: Callable[[RepoSpec], Listing | None]  # what that cache knows of a repository
    repository: Callable[[Client, RepoSpec], Remote]  # to write to
    bare_host: bool = False  # the endpoint may be named without https://, as the hub's own client takes it
    renamed_branches: Mapping[str, str] = field(default_factory=dict[str, str])  # given to push -> meant
    pull_requests: bool = False
    token_headers: Callable[[str], dict[str, str]] = _nothing  # besides Authorization
    transports: Mapping[str, Transport] = field(default_factory=dict[str, Transport])  # besides http
    llamacpp_environment: Mapping[str, str] = field(default_factory=dict[str, str])  # for `llama-server -hf ORG/NAME`
    ollama: str = ""  # its name in `ollama run NAME/ORG/REPO:TYPE`; none where Ollama does not know it
    vllm_environment: Mapping[str, str] = field(default_factory=dict[str, str])  # for `vllm serve ORG/NAME`
    mlx_environment: Mapping[str, str] = field(default_factory=dict[str, str])  # for `mlx_lm.server --model ORG/NAME`

    def page_url(self, endpoint: str, repo: str) -> str:
        """The address of a repository's page."""
        return f"{endpoint}/{self.page}{repo}"

    @property
    def offline(self) -> bool:
        """Whether its switch forbids to reach it, read as huggingface_hub reads HF_HUB_OFFLINE."""
        value = os.environ.get(self.offline_variable, "") if self.offline_variable else ""
        return value.upper() in ("1", "ON", "YES", "TRUE")
