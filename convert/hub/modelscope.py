"""ModelScope: what is said of this hub alone, its listing apart (modelscope_list.py). Its row in the table is `HUB`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlencode, urlsplit

from mmquant.errors import InputError

from ..files.parse import one_line, take, take_list
from .http import (
    MISREAD,
    NETWORK_ERRORS,
    TRANSIENT,
    Client,
    HubError,
    TransferError,
    explain,
    joined,
    misread,
    origin,
    reason,
    redact,
    retry_after,
    whole_body,
)
from .interface import Hub
from .listing import LISTING_LIMIT, Listing, RepoFile, RepoSpec, parse
from .modelscope_list import list_files
from .remote import Conflict, Upload, is_inline

if TYPE_CHECKING:
    import requests

_CACHE = re.compile(r"(?:.*/)?modelscope/(?:hub/)?(?:models/)?([\w.-]+)/([\w.-]+)(?:/.*)?", re.ASCII)


# -- where it is, and who asks -----------------------------------------------------------------------------------------


def account() -> tuple[str, str | None]:
    """(endpoint, token): MODELSCOPE_ENDPOINT; MODELSCOPE_API_TOKEN or the login file."""
    from modelscope_hub.config import HubConfig

    config = HubConfig()
    return str(config.endpoint), config.token or None


def _cookie(token: str) -> dict[str, str]:
    return {"Cookie": f"m_session_id={token}"}


def file_url(endpoint: str, spec: RepoSpec, path: str) -> str:
    """Where a file of a repository is read."""
    return f"{endpoint}/api/v1/models/{spec.repo}/repo?" + urlencode({"Revision": spec.revision, "FilePath": path})


# -- its client's cache ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """modelscope's cache: MODELSCOPE_CACHE, else ~/.cache/modelscope/hub."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or os.path.join("~", ".cache", "modelscope", "hub")).expanduser()


def candidates(spec: RepoSpec, file: RepoFile) -> list[Path]:
    """Where modelscope would have put this file."""
    owner, name = spec.repo.split("/")
    repos = (f"{owner}/{name}", f"{owner}/{name.replace('.', '___')}")
    return [cache_folder() / part / repo / file.path for part in ("models", "") for repo in repos]


def cached_repository(path: str) -> tuple[str, str] | None:
    """(ORG/NAME, "") of a path with slashes in the cache, None elsewhere; it does not tell the commit."""
    match = _CACHE.fullmatch(path)
    return (f"{match[1]}/{match[2].replace('___', '.')}", "") if match else None


def offline_listing(spec: RepoSpec) -> Listing | None:
    """None: the cache records no digests."""
    return None


# -- write -------------------------------------------------------------------------------------------------------------


class Repository:
    """create_repo through modelscope-hub; blobs and commits by its wire format.

    Its own upload functions make a commit a file, and its blob upload sends the token to whatever host the presigned
    address names; here the token goes to the hub's own site only.
    """

    def __init__(self, client: Client, spec: RepoSpec) -> None:
        self.client, self.spec = client, spec

    def create(self, private: bool) -> None:
        """Make the repository, and the branch, unless they exist."""
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError as ModelScopeError

        url = f"{self.client.endpoint.url}/api/v1/models/{self.spec.repo}"
        response = self.client.send("GET", url, what=str(self.spec))
        response.close()
        if response.status_code == 200:
            return
        api = HubApi(token=self.client.endpoint.token, endpoint=self.client.endpoint.url)
        visibility = "private" if private else "public"
        try:
            # Without `license` the hub would say Apache-2.0.
            api.create_repo(self.spec.repo, "model", visibility=visibility, license="other")
        except ModelScopeError as error:
            text = redact(str(error).split(" Request:")[0], self.client.endpoint.token)[:200]
            raise HubError(f"{self.spec}: the repository cannot be made ({text}), check MODELSCOPE_API_TOKEN") from None
        except MISREAD as error:
            trouble = misread(error, "modelscope_hub")
            raise HubError(f"{self.spec}: {trouble}, expected the hub's API at {self.client.endpoint.url}") from None

    def open_request(self, title: str) -> str:
        """Open a pull request; its revision."""
        raise InputError("--pr: ModelScope's API has no pull requests, expected --hub hf or no --pr")

    def listing(self) -> Listing:
        """Files of the branch as the hub lists them now."""
        return list_files(self.client, self.spec)

    def check_card(self, text: str) -> None:
        """ModelScope has no such question."""

    def upload(self, file: Upload) -> None:
        """Bring a large file's bytes to the hub, where they wait for a commit."""
        if is_inline(file):
            return
        href = self._batch(file)
        for attempt in range(self.client.retry.attempts + 1):
            if href is None:
                return
            trouble, asked = "", None
            with contextlib.suppress(FileNotFoundError), open(file.local, "rb") as source:
                try:
                    response = self._put(href, source, file.size)
                    if response.status_code < 300:
                        response.close()
                        return
                    if response.status_code not in TRANSIENT and response.status_code not in (401, 403):
                        raise explain(response, self.client.endpoint, f"{self.spec} {file.path}")
                    trouble, asked = f"HTTP {response.status_code}", retry_after(response.headers)
                    response.close()
                except NETWORK_ERRORS as error:
                    trouble = reason(error)
            if attempt == self.client.retry.attempts:
                raise TransferError(f"{self.spec} {file.path}: {trouble}; run the command again to continue")
            self.client.pause(attempt, asked)
            href = self._batch(file)

    def commit(self, files: Sequence[Upload], message: str, before: Listing) -> None:
        """Commit files that were uploaded, and small ones. Conflict when the answer was lost or the branch moved."""
        url = f"{self._base}/commit/{self.spec.revision}"
        actions = [_action(f, "update" if f.path in before.files else "create") for f in files]
        data = json.dumps({"commit_message": message, "actions": actions}).encode()
        try:
            response = self.client.once("POST", url, {"Content-Type": "application/json"}, data)
            answer = whole_body(response, LISTING_LIMIT, str(self.spec))
        except NETWORK_ERRORS as error:
            self.client.pause(0)
            raise Conflict(reason(error)) from None
        if response.status_code in TRANSIENT:
            self.client.pause(0, retry_after(response.headers))
            raise Conflict(f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise explain(response, self.client.endpoint, str(self.spec))
        if parse(answer, str(self.spec)).get("Success") is False:
            raise HubError(
                f"{self.spec}: the commit is refused, {one_line(parse(answer, str(self.spec)).get('Message'))}"
            )

    @property
    def _base(self) -> str:
        return f"{self.client.endpoint.url}/api/v1/repos/models/{self.spec.repo}"

    def _batch(self, file: Upload) -> str | None:
        """Where to put a blob; None when the hub has it."""
        expected = {"operation": "upload", "objects": [{"oid": file.sha256, "size": file.size}]}
        headers = {"Content-Type": "application/json"}
        url = f"{self._base}/info/lfs/objects/batch"
        response = self.client.send("POST", url, headers, what=str(self.spec), body=json.dumps(expected).encode())
        if response.status_code != 200:
            raise explain(response, self.client.endpoint, str(self.spec))
        what = str(self.spec)
        answer = take(parse(whole_body(response, LISTING_LIMIT, what), what), "Data", dict, what, {})
        found: list[dict[str, Any]] = take_list(answer, "objects", dict, what, [])
        actions = take(found[0] if found else {}, "actions", dict, what, {})
        href = take(take(actions, "upload", dict, what, {}), "href", str, what, None)
        return None if href is None else joined(url, href)

    def _put(self, href: str, source: BinaryIO, size: int) -> requests.Response:
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        client = self.client
        if same_site(href, client.endpoint.url) and origin(href) != origin(client.endpoint.url):
            token = client.endpoint.token
            headers |= {"Authorization": f"Bearer {token}", **_cookie(token)} if token else {}
        return client.once("PUT", href, headers, source)


def same_site(url: str, endpoint: str) -> bool:
    """Whether a host is the hub's or one of its subdomains (lfs.modelscope.cn), over https."""
    host, own = urlsplit(url).hostname or "", urlsplit(endpoint).hostname or ""
    return urlsplit(url).scheme == "https" and "." in own and host.endswith("." + own.removeprefix("www."))


def _action(file: Upload, action: str) -> dict[str, Any]:
    base = {"action": action, "path": file.path, "size": file.size}
    if is_inline(file):
        content = base64.b64encode(file.local.read_bytes()).decode()
        return {**base, "type": "normal", "sha256": "", "content": content, "encoding": "base64"}
    return {**base, "type": "lfs", "sha256": file.sha256, "content": "", "encoding": ""}


HUB = Hub(
    key="ms",
    name="ModelScope",
    manifest_name="modelscope",
    hosts=("modelscope.cn", "modelscope.ai"),
    endpoint="https://modelscope.cn",
    endpoint_variable="MODELSCOPE_ENDPOINT",
    bare_host=True,
    token_variable="MODELSCOPE_API_TOKEN",
    login="ms-hub login",
    offline_variable=None,  # it has no such switch
    page="models/",
    branch="master",
    renamed_branches={"main": "master"},
    download="ms-hub download",
    token_headers=_cookie,
    ollama="modelscope.cn",
    llamacpp_environment={"MODEL_ENDPOINT": "https://www.modelscope.cn"},
    vllm_environment={"VLLM_USE_MODELSCOPE": "True"},
    mlx_environment={"MLXLM_USE_MODELSCOPE": "True"},
    account=account,
    list_files=list_files,
    file_url=file_url,
    candidates=candidates,
    cached_repository=cached_repository,
    offline_listing=offline_listing,
    repository=Repository,
)
