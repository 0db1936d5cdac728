"""Write to a repository on either hub: create it, upload one large file, commit a batch."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from mmquant.errors import InputError

from ..files.parse import one_line, take, take_list
from .http import (
    HF,
    MS,
    NETWORK_ERRORS,
    TRANSIENT,
    UNRESOLVED,
    Client,
    HubError,
    TransferError,
    explain,
    joined,
    origin,
    reason,
    redact,
    retry_after,
    whole_body,
)
from .listing import DEFAULT_REVISION, LISTING_LIMIT, Listing, RepoSpec, list_repo, parse

INLINE = 64 << 10  # bytes; larger files are LFS objects on ModelScope
BINARY = (".safetensors", ".gguf", ".bin", ".npz")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Upload:
    """A local file and its place in the repository."""

    path: str
    local: Path
    size: int
    sha256: str


class Conflict(Exception):
    """Somebody else's commit came first, or our own one whose answer was lost: look again."""


class Remote(Protocol):
    """What both hubs can do for a push."""

    spec: RepoSpec
    client: Client

    def create(self, private: bool) -> None:
        """Make the repository and its branch when they do not exist."""
        ...

    def open_request(self, title: str) -> str:
        """A pull request's branch name to commit to."""
        ...

    def listing(self) -> Listing:
        """What the branch holds now."""
        ...

    def check_card(self, text: str) -> None:
        """InputError when the hub would refuse this README.md; nothing where the hub cannot be asked."""
        ...

    def upload(self, file: Upload) -> None:
        """Bring one file's bytes to the hub's store; nothing moves when it has them."""
        ...

    def commit(self, files: Sequence[Upload], message: str, before: Listing) -> None:
        """One commit on top of `before`. Raises Conflict when the outcome is unknown or the branch has moved."""
        ...


def is_inline(file: Upload) -> bool:
    """Small text goes into the commit itself."""
    return file.size <= INLINE and not file.path.endswith(BINARY)


class HuggingFace:
    """Through huggingface_hub's public calls: create_repo, preupload_lfs_files, create_commit."""

    def __init__(self, client: Client, spec: RepoSpec) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        self.client, self.spec = client, spec
        self._api = HfApi(endpoint=client.endpoint.url, token=client.endpoint.token or False)
        self._ready: dict[str, Any] = {}

    def create(self, private: bool) -> None:
        self._call(lambda: self._api.create_repo(self.spec.repo, private=private, exist_ok=True))
        if self.spec.revision != DEFAULT_REVISION[HF] and not self.spec.revision.startswith("refs/"):
            self._call(lambda: self._api.create_branch(self.spec.repo, branch=self.spec.revision, exist_ok=True))

    def open_request(self, title: str) -> str:
        return str(self._call(lambda: self._api.create_pull_request(self.spec.repo, title=title)).git_reference)

    def listing(self) -> Listing:
        return list_repo(self.client, self.spec)

    def check_card(self, text: str) -> None:
        url = f"{self.client.endpoint.url}/api/validate-yaml"
        body = json.dumps({"content": text, "repoType": "model"}).encode()
        try:
            response = self.client.send("POST", url, {"Content-Type": "application/json"}, what="README.md", body=body)
            if response.status_code not in (200, 400):
                response.close()
                return  # the commit will say what is wrong
            answer = parse(whole_body(response, LISTING_LIMIT, "README.md"), "README.md")
        except TransferError:
            return
        if errors := take_list(answer, "errors", dict, "README.md", []):
            said = "; ".join(one_line(error.get("message")) for error in errors)
            raise InputError(f"README.md: the hub refuses its front matter: {said}")

    def upload(self, file: Upload) -> None:
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(file.path, str(file.local))
        repo, revision = self.spec.repo, self.spec.revision
        self._call(lambda: self._api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False))
        self._ready[file.path] = operation

    def commit(self, files: Sequence[Upload], message: str, before: Listing) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = [self._ready.pop(f.path, None) or CommitOperationAdd(f.path, str(f.local)) for f in files]
        self._call(
            lambda: self._api.create_commit(
                self.spec.repo,
                operations,
                commit_message=message,
                revision=self.spec.revision,
                parent_commit=before.commit,
            ),
            once=True,
        )

    def _call(self, call: Callable[[], Result], once: bool = False) -> Result:
        """A call of the library, with its errors in one line; `once`: never repeated blindly, Conflict instead."""
        from huggingface_hub.errors import HfHubHTTPError

        trouble, host = "", urlsplit(self.client.endpoint.url).hostname
        for attempt in range(self.client.retry.attempts + 1):
            asked = None
            try:
                return call()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in TRANSIENT and status not in (409, 412):
                    raise self._refusal(status, str(error)) from None
                trouble, asked = f"HTTP {status}", retry_after(error.response.headers)
            except (_library_error(), RuntimeError) as error:
                trouble = redact(str(error), self.client.endpoint.token) or type(error).__name__
                if reason(error) == UNRESOLVED:
                    raise TransferError(f"{self.spec}: {host}: {UNRESOLVED}, is this machine online?") from None
            if once:
                self.client.pause(0, asked)
                raise Conflict(trouble)
            if attempt < self.client.retry.attempts:
                self.client.pause(attempt, asked)
        raise TransferError(f"{self.spec}: {host}: {trouble}; run the command again to continue")

    def _refusal(self, status: int, text: str) -> HubError | TransferError:
        if status in (401, 403):
            return HubError(f"{self.spec}: no write access (HTTP {status}), set HF_TOKEN to a token that may write")
        if status == 404:
            return HubError(f"{self.spec}: not found (HTTP 404), check the name, the branch and the token's access")
        return TransferError(f"{self.spec}: HTTP {status}, {redact(text, self.client.endpoint.token)[:200]}")


def _library_error() -> type[Exception]:
    """The base of huggingface_hub's network errors: HTTPError of whichever httpx it is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError" and issubclass(c, Exception))


class ModelScope:
    """create_repo through modelscope-hub; blobs and commits by its wire format.

    Its own upload functions make a commit a file, and its blob upload sends the token to whatever host the presigned
    address names; here the token goes to the hub's own site only.
    """

    def __init__(self, client: Client, spec: RepoSpec) -> None:
        self.client, self.spec = client, spec

    def create(self, private: bool) -> None:
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

    def open_request(self, title: str) -> str:
        raise InputError("--pr: ModelScope's API has no pull requests, expected --hub hf or no --pr")

    def listing(self) -> Listing:
        return list_repo(self.client, self.spec)

    def check_card(self, text: str) -> None:
        """ModelScope has no such question."""

    def upload(self, file: Upload) -> None:
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
        wanted = {"operation": "upload", "objects": [{"oid": file.sha256, "size": file.size}]}
        headers = {"Content-Type": "application/json"}
        url = f"{self._base}/info/lfs/objects/batch"
        response = self.client.send("POST", url, headers, what=str(self.spec), body=json.dumps(wanted).encode())
        if response.status_code != 200:
            raise explain(response, self.client.endpoint, str(self.spec))
        what = str(self.spec)
        answer = take(parse(whole_body(response, LISTING_LIMIT, what), what), "Data", dict, what, {})
        found: list[dict[str, Any]] = take_list(answer, "objects", dict, what, [])
        actions = take(found[0] if found else {}, "actions", dict, what, {})
        href = take(take(actions, "upload", dict, what, {}), "href", str, what, None)
        return None if href is None else joined(url, href)

    def _put(self, href: str, source: Any, size: int) -> Any:
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        client = self.client
        if same_site(href, client.endpoint.url) and origin(href) != origin(client.endpoint.url):
            token = client.endpoint.token
            headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
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


def remote_of(client: Client, repo: str, revision: str | None) -> Remote:
    """The repository ORG/NAME on the client's hub; ValueError for a malformed name or branch."""
    hub = client.endpoint.hub
    spec = RepoSpec(hub, repo, revision or DEFAULT_REVISION[hub])
    if hub == MS and spec.revision == "main":
        spec = replace(spec, revision=DEFAULT_REVISION[MS])
    return HuggingFace(client, spec) if hub == HF else ModelScope(client, spec)
