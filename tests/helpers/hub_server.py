"""An HTTP server of both hubs for tests: their clients' endpoints, with faults on demand.

    with HubServer() as hub:
        hub.seed("org/m", {"config.json": b"{}"})
        hub.fault("GET /cdn/", cut=1000)
        run_client(env=hub.environment())

Files above 1 KiB or with a binary name are LFS objects, served by a redirect to another origin (as the hubs' CDNs are),
which records whether it ever saw a credential. Everything is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TOKEN = "hf_" + "Secret" * 6
BINARY = (".safetensors", ".gguf", ".bin")
PIECE = 1 << 14


class Content(Protocol):
    """What an object holds: bytes, or something that makes each slice when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | bytearray: ...


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    sha256: str
    size: int
    git: str
    lfs: bool


@dataclass
class Commit:
    oid: str
    parent: str | None
    tree: dict[str, Entry]
    title: str
    touched: dict[str, str]  # path -> oid of the last commit that changed it


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    license: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def at(self, revision: str) -> Commit | None:
        revision = {"master": "main"}.get(revision, revision)
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[Commit]:
        out, oid = [], self.branches.get(branch)
        while oid:
            out.append(self.commits[oid])
            oid = self.commits[oid].parent
        return out


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path?query" matches."""

    pattern: re.Pattern[str]
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # drop the connection after so many bytes of the body
    flip: int | None = None  # invert the byte at this offset of the body
    hang: bool = False  # no more after the body's first piece, until the hub lets go
    trickle: float | None = None  # seconds between single bytes
    ignore_range: bool = False
    total: int | None = None  # claim this size in Content-Range
    lost: bool = False  # do the work, then drop the connection
    hold: bool = False  # no answer until the hub lets go
    body: bytes | None = None  # the whole answer, with status 200, in place of the work


class Failure(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class HubServer:
    def __init__(self, *, token: str = TOKEN, page: int = 1000, redirect: bool = True) -> None:
        self.token, self.page, self.redirect = token, page, redirect
        self.objects: dict[str, Content] = {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.twist: Callable[[str, Any], Any] = lambda hub, items: items  # ("hf" or "ms", entries) -> what is listed
        self.lock = threading.RLock()
        self.sent = 0
        self.watch: Callable[[str], None] = lambda line: None  # called with each request before it is answered
        self.free = threading.Event()  # set: nothing is held
        self.held = self.busy = 0  # requests that wait for `let_go`; requests in work, those among them
        self.active = 0
        self.peak = 0
        self.servers = [self._server("127.0.0.1"), self._server("localhost")]
        self.url, self.cdn = (f"http://{h}:{s.server_address[1]}" for h, s in self.servers_with_hosts())

    def servers_with_hosts(self) -> Iterable[tuple[str, ThreadingHTTPServer]]:
        return zip(("127.0.0.1", "localhost"), self.servers, strict=True)

    def _server(self, host: str) -> ThreadingHTTPServer:
        handler = type("Bound", (Handler,), {"hub": self})

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:  # a client that was killed
                pass

        return Server((host, 0), handler)

    def __enter__(self) -> HubServer:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.free.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # -- for tests -------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What points both clients here; HF_HUB_OFFLINE is cleared."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_API_TOKEN": self.token,
        }

    def use(self, patch: pytest.MonkeyPatch, folder: Path) -> HubServer:
        """Point this process and its children here, with caches below `folder`, until `patch` is undone."""
        caches = {"MMQUANT_CACHE": "cache", "HF_HOME": "hf", "MODELSCOPE_CACHE": "ms"}
        for name, value in (self.environment() | {name: str(folder / part) for name, part in caches.items()}).items():
            patch.setenv(name, value)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when imported, by `make test` set
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        return self

    def fault(self, pattern: str, **what: Any) -> Fault:
        fault = Fault(re.compile(pattern), **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def hold(self, pattern: str, after: int = 0) -> None:
        """Answer no request that matches, but the first `after` of them, until `let_go`."""
        self.free.clear()
        if after:
            self.fault(pattern, times=after)
        self.fault(pattern, times=1 << 30, hold=True)

    def let_go(self) -> None:
        """Answer what was held, and hold nothing any more; returns when all of it is answered."""
        self.faults.clear()
        self.free.set()
        while self.busy:
            time.sleep(0.001)

    def wait(self) -> None:
        """Called by a request that is held."""
        with self.lock:
            self.held += 1
        self.free.wait()
        with self.lock:
            self.held -= 1

    def calls(self, pattern: str) -> list[dict[str, Any]]:
        with self.lock:
            return [c for c in self.log if re.search(pattern, c["line"])]

    def seed(self, repo_id: str, files: dict[str, bytes], **what: Any) -> str:
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id))
            for name, value in what.items():
                setattr(repo, name, value)
            return self.commit(repo, "main", {p: self.store(p, d) for p, d in files.items()}, "seed").oid

    def store(self, path: str, data: bytes) -> Entry:
        sha = hashlib.sha256(data).hexdigest()
        self.objects[sha] = data
        return self.entry(path, sha)

    def is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (path.endswith(BINARY) or size > 1 << 16)

    def entry(self, path: str, sha: str) -> Entry:
        data = self.objects[sha]
        lfs = self.is_lfs(path, len(data))
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (sha.encode(), len(data))
        return Entry(sha, len(data), git_sha1(pointer if lfs else bytes(data[:])), lfs)

    def commit(self, repo: Repo, branch: str, add: dict[str, Entry], title: str, delete: Iterable[str] = ()) -> Commit:
        head = repo.branches.get(branch)
        before = repo.commits[head] if head else None
        tree = {**(before.tree if before else {}), **add}
        for path in delete:
            tree.pop(path, None)
        seed = json.dumps([head, title, len(repo.commits), sorted((p, e.sha256) for p, e in tree.items())])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        touched = {**(before.touched if before else {}), **dict.fromkeys(add, oid)}
        repo.commits[oid] = Commit(oid, head, tree, title, touched)
        repo.branches[branch] = oid
        return repo.commits[oid]

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        commit = self.repos[repo_id].at(revision)
        assert commit is not None
        return bytes(self.objects[commit.tree[path].sha256][:])

    def tree(self, repo_id: str, revision: str = "main") -> dict[str, Entry]:
        commit = self.repos[repo_id].at(revision)
        assert commit is not None
        return commit.tree


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # -- plumbing --------------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        if self._body is None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                self._body = self._chunked()
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def _chunked(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def reply(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self._lost:
            return
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), headers)

    def drop(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def dispatch(self) -> None:
        self._body: bytes | None = None
        self.body()  # whatever it is, it must not be taken for the next request
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        line = f"{self.command} {unquote(url.path)}" + (f"?{url.query}" if url.query else "")
        secret = (self.headers.get("Authorization") or "") + (self.headers.get("Cookie") or "") + self.path
        on_cdn = self.headers.get("Host", "").startswith("localhost")
        with self.hub.lock:
            self.hub.log.append(
                {
                    "line": line,
                    "range": self.headers.get("Range"),
                    "secret": self.hub.token in secret,
                    "cdn": on_cdn,
                    "time": time.monotonic(),
                }
            )
            self.fault = next((f for f in self.hub.faults if f.times > 0 and f.pattern.search(line)), None)
            if self.fault:
                self.fault.times -= 1
        with self.hub.lock:
            self.hub.busy += 1
            self.hub.watch(line)
        try:
            self.answer(url.path)
        finally:
            with self.hub.lock:
                self.hub.busy -= 1

    def answer(self, path: str) -> None:
        fault = self.fault
        self._lost = bool(fault and fault.lost)
        if fault and fault.hold:
            self.hub.wait()
        try:
            if fault and fault.body is not None:
                return self.reply(200, fault.body)
            if fault and fault.status:
                self.body()
                self.reply(fault.status, b"{}", fault.headers)
                return
            self.route(path)
            if self._lost:
                self.drop()
        except Failure as failure:
            self.body()
            headers = {"X-Error-Code": failure.code} if failure.code else {}
            headers |= {"X-Error-Message": failure.message} | failure.headers
            self.json({"error": failure.message, "Message": failure.message, "Success": False}, failure.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def route(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            if (self.command == method or (method, self.command) == ("GET", "HEAD")) and (m := pattern.fullmatch(path)):
                function(self, **{k: unquote(v) for k, v in m.groupdict().items()})
                return
        raise Failure(404, f"no route for {self.command} {path}")

    # -- access ----------------------------------------------------------------------------------------------------

    def signed_in(self) -> bool:
        token = self.hub.token
        cookie = self.headers.get("Cookie") or ""
        return self.headers.get("Authorization") == f"Bearer {token}" or f"m_session_id={token}" in cookie

    def need_write(self) -> None:
        if not self.signed_in():
            raise Failure(401, "Invalid username or password.")

    def repo(self, repo_id: str) -> Repo:
        found = self.hub.repos.get(repo_id)
        if found is None or (found.private and not self.signed_in()):
            raise Failure(404 if self.signed_in() else 401, "Repository not found", "RepoNotFound")
        return found

    def readable(self, repo_id: str) -> Repo:
        found = self.repo(repo_id)
        if found.gated:
            text = f"Access to model {repo_id} is restricted. You must be authenticated and on the authorized list."
            raise Failure(403 if self.signed_in() else 401, text, "GatedRepo")
        return found

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- bodies ----------------------------------------------------------------------------------------------------

    def serve(self, sha: str, extra: dict[str, str]) -> None:
        data, fault = self.hub.objects[sha], self.fault
        first, last, status = 0, len(data) - 1, 200
        asked = self.headers.get("Range")
        if asked and not (fault and fault.ignore_range):
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            if not match or int(match[1]) >= len(data):
                raise Failure(416, "range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
            first, last, status = int(match[1]), min(int(match[2] or last), last), 206
        self.send_response(status)
        if status == 206:
            total = fault.total if fault and fault.total else len(data)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        for key, value in extra.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with self.hub.lock:
                self.hub.active += 1
                self.hub.peak = max(self.hub.peak, self.hub.active)
            try:
                self.stream(data, first, last + 1)
            finally:
                with self.hub.lock:
                    self.hub.active -= 1

    def stream(self, data: Content, first: int, last: int) -> None:
        """Bytes [first, last) of an object; places of a fault count from `first`."""
        fault = self.fault or Fault(re.compile(""))
        if fault.trickle is not None:
            for byte in data[first:last]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(fault.trickle)
            return
        stop = last if fault.cut is None else min(first + fault.cut, last)
        for at in range(first, stop, PIECE):
            piece = bytearray(data[at : min(at + PIECE, stop)])
            if fault.flip is not None and 0 <= first + fault.flip - at < len(piece):
                piece[first + fault.flip - at] ^= 0xFF
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if fault.hang:
                self.wfile.flush()
                self.hub.wait()
        if fault.cut is not None:
            self.drop()


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    parts = {"id": "[^/]+/[^/]+?", "rev": "[^/]+", "path": ".+", "sha": "[0-9a-f]{64}", "num": "[0-9]+"}
    for name, part in parts.items():
        pattern = pattern.replace("{" + name + "}", f"(?P<{name}>{part})")

    def add(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


# -- Hugging Face --------------------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(h: Handler) -> None:
    h.need_write()
    h.json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/repos/create")
def create(h: Handler) -> None:
    h.need_write()
    asked = json.loads(h.body())
    repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
    answer = {"url": f"{h.hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
    with h.hub.lock:
        if repo_id in h.hub.repos:
            h.json({**answer, "error": "You already created this model repo"}, 409)
            return
        repo = h.hub.repos[repo_id] = Repo(repo_id)
        repo.private = bool(asked.get("private")) or asked.get("visibility") == "private"
        h.hub.commit(repo, "main", {".gitattributes": h.hub.store(".gitattributes", b"*.gguf filter=lfs\n")}, "initial")
    h.json(answer)


@route("GET", "/api/models/{id}")
def info(h: Handler, id: str) -> None:
    info_at(h, id, "main")


@route("GET", "/api/models/{id}/revision/{rev}")
def info_at(h: Handler, id: str, rev: str) -> None:
    repo = h.repo(id)
    commit = h.commit_at(repo, rev)
    siblings = [{"rfilename": path} for path in commit.tree]
    h.json(
        {"id": id, "sha": commit.oid, "private": repo.private, "gated": repo.gated, "tags": [], "siblings": siblings}
    )


def tree_item(path: str, entry: Entry) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.git}
    if entry.lfs:
        item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
    return item


@route("GET", "/api/models/{id}/tree/{rev}")
def tree(h: Handler, id: str, rev: str) -> None:
    commit = h.commit_at(h.readable(id), rev)
    folders = sorted({p.rsplit("/", 1)[0] for p in commit.tree if "/" in p})
    items: list[dict[str, Any]] = [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]
    items += [tree_item(p, e) for p, e in sorted(commit.tree.items())]
    at, page = int(h.query.get("cursor", 0)), h.hub.page
    headers = {}
    if at + page < len(items):
        more = f"{h.hub.url}/api/models/{id}/tree/{rev}?recursive=true&cursor={at + page}"
        headers["Link"] = f'<{more}>; rel="next"'
    h.json(h.hub.twist("hf", items[at : at + page]), headers=headers)


@route("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(h: Handler, id: str, rev: str) -> None:
    body = h.body()
    paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
    found = h.commit_at(h.readable(id), rev).tree
    h.json([tree_item(p, found[p]) for p in paths if p in found])


@route("GET", "/api/models/{id}/refs")
def refs(h: Handler, id: str) -> None:
    repo = h.repo(id)
    branches = [
        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": o}
        for n, o in repo.branches.items()
        if not n.startswith("refs/")
    ]
    h.json({"branches": branches, "tags": [], "converts": [], "pullRequests": []})


@route("POST", "/api/models/{id}/branch/{rev}")
def branch(h: Handler, id: str, rev: str) -> None:
    h.need_write()
    repo = h.repo(id)
    if rev in repo.branches:
        raise Failure(409, "Reference already exists")
    repo.branches[rev] = repo.branches["main"]
    h.json({})


@route("POST", "/api/models/{id}/discussions")
def discussion(h: Handler, id: str) -> None:
    h.need_write()
    repo = h.repo(id)
    repo.pull_requests += 1
    repo.branches[f"refs/pr/{repo.pull_requests}"] = repo.branches["main"]
    h.json({"num": repo.pull_requests})


@route("GET", "/api/models/{id}/discussions/{num}")
def discussion_at(h: Handler, id: str, num: str) -> None:
    h.repo(id)
    h.json(
        {
            "num": int(num),
            "title": "mmquant",
            "status": "draft",
            "isPullRequest": True,
            "author": {"name": "me"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "events": [],
            "filesWithConflicts": [],
            "diff": "",
            "changes": {"base": "refs/heads/main"},
            "repo": {"name": id, "type": "model"},
        }
    )


@route("POST", "/api/validate-yaml")
def validate_yaml(h: Handler) -> None:
    """The hub's rule for base_model, which refuses a folder's name."""
    front = yaml.safe_load(json.loads(h.body())["content"].split("---")[1])
    base = front.get("base_model", [])
    names = base if isinstance(base, list) else [base]
    wrong = [name for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))]
    errors = [{"message": f'"base_model" {name!r} is not a model id'} for name in wrong]
    errors += [{"message": '"language" must be an array'}] if front.get("language") == 7 else []
    h.json({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("POST", "/api/models/{id}/preupload/{rev}")
def preupload(h: Handler, id: str, rev: str) -> None:
    h.need_write()
    found = h.commit_at(h.repo(id), rev).tree
    out = []
    for file in json.loads(h.body())["files"]:
        lfs = h.hub.is_lfs(file["path"], file["size"])
        old = found.get(file["path"])
        item = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        out.append({**item, "oid": old.sha256 if old.lfs else old.git} if old else item)
    h.json({"files": out})


@route("POST", "/{id}\\.git/info/lfs/objects/batch")
def lfs_batch(h: Handler, id: str) -> None:
    h.need_write()
    h.repo(id)
    h.json({"transfer": "basic", "objects": [lfs_object(h, o) for o in json.loads(h.body())["objects"]]})


def lfs_object(h: Handler, wanted: dict[str, Any]) -> dict[str, Any]:
    item = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
    if wanted["oid"] in h.hub.objects:
        return item
    return {**item, "actions": {"upload": {"href": f"{h.hub.cdn}/s3/{wanted['oid']}?sig=x"}}}


@route("PUT", "/s3/{sha}")
def put(h: Handler, sha: str) -> None:
    data = h.body()
    if hashlib.sha256(data).hexdigest() != sha:
        raise Failure(400, "sha256 mismatch")
    h.hub.objects[sha] = data
    h.reply(200, b"", {"ETag": f'"{sha[:32]}"'})


@route("POST", "/api/models/{id}/commit/{rev}")
def commit(h: Handler, id: str, rev: str) -> None:
    h.need_write()
    repo, header = h.repo(id), {}
    add: dict[str, Entry] = {}
    delete: list[str] = []
    for line in h.body().splitlines():
        part = json.loads(line)
        value = part["value"]
        if part["key"] == "header":
            header = value
        elif part["key"] == "file":
            add[value["path"]] = h.hub.store(value["path"], base64.b64decode(value["content"]))
        elif part["key"] == "lfsFile":
            if value["oid"] not in h.hub.objects:
                raise Failure(400, f"LFS pointer {value['path']} refers to an object that is not stored")
            add[value["path"]] = h.hub.entry(value["path"], value["oid"])
        else:
            delete.append(value["path"])
    with h.hub.lock:
        head = h.commit_at(repo, rev)
        if header.get("parentCommit") and header["parentCommit"] != head.oid:
            raise Failure(412, "A commit has happened since. Please refresh and try again.")
        made = h.hub.commit(repo, rev, add, header.get("summary", ""), delete)
    h.json({"success": True, "commitUrl": f"{h.hub.url}/{id}/commit/{made.oid}", "commitOid": made.oid})


@route("GET", "/{id}/resolve/{rev}/{path}")
def resolve(h: Handler, id: str, rev: str, path: str) -> None:
    commit = h.commit_at(h.readable(id), rev)
    entry = commit.tree.get(path)
    headers = {"X-Repo-Commit": commit.oid}
    if entry is None:
        raise Failure(404, "Entry not found", "EntryNotFound", headers)
    if not entry.lfs:
        h.serve(entry.sha256, {**headers, "ETag": f'"{entry.git}"', "X-Linked-Size": str(entry.size)})
        return
    headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
    if h.hub.redirect:
        h.reply(302, b"", {**headers, "Location": f"{h.hub.cdn}/cdn/{entry.sha256}?sig=x"})
    else:
        h.serve(entry.sha256, {**headers, "ETag": f'"{entry.sha256}"'})


@route("GET", "/cdn/{sha}")
def cdn(h: Handler, sha: str) -> None:
    h.serve(sha, {"ETag": f'"{sha}"', "Last-Modified": formatdate(0)})


# -- ModelScope ----------------------------------------------------------------------------------------------------

MS = "/api/v1"


def answer(h: Handler, data: Any) -> None:
    h.json({"Code": 200, "Success": True, "Message": "success", "RequestId": "test", "Data": data})


@route("POST", MS + "/models")
def ms_create(h: Handler) -> None:
    h.need_write()
    asked = json.loads(h.body())
    repo_id = f"{asked['Path']}/{asked['Name']}"
    if repo_id in h.hub.repos:
        raise Failure(400, "model already exists")
    repo = h.hub.repos[repo_id] = Repo(repo_id, private=asked.get("Visibility") == 1, license=asked.get("License"))
    h.hub.commit(repo, "main", {".gitattributes": h.hub.store(".gitattributes", b"*.gguf filter=lfs\n")}, "initial")
    answer(h, {"Path": asked["Path"], "Name": asked["Name"], "Id": 1, "Visibility": asked.get("Visibility")})


@route("GET", MS + "/models/{id}")
def ms_info(h: Handler, id: str) -> None:
    repo = h.repo(id)
    owner, name = id.split("/")
    answer(h, {"Path": owner, "Name": name, "Id": 1, "Visibility": 5, "License": repo.license})


@route("GET", MS + "/models/{id}/repo/files")
def ms_files(h: Handler, id: str) -> None:
    commit = h.commit_at(h.readable(id), h.query.get("Revision", "master"))
    root = h.query.get("Root", "").strip("/")
    prefix = root + "/" if root else ""
    inside = {p[len(prefix) :]: e for p, e in sorted(commit.tree.items()) if p.startswith(prefix)}
    recursive = h.query.get("Recursive") == "True"
    folders = {p.rsplit("/", 1)[0] if recursive else p.split("/")[0] for p in inside if "/" in p}
    out: list[dict[str, Any]] = [
        {"Path": prefix + f, "Name": f, "Type": "tree", "Size": 0, "Revision": "", "Sha256": ""} for f in folders
    ]
    for name, entry in inside.items():
        if recursive or "/" not in name:
            made = {"Path": prefix + name, "Name": name, "Type": "blob", "Size": entry.size, "IsLFS": entry.lfs}
            revision = commit.touched[prefix + name]
            out.append({**made, "Sha256": entry.sha256, "Revision": revision, "CommittedDate": 1767225600})
    answer(h, {"Files": h.hub.twist("ms", out[:3000]), "LatestCommitter": {"Id": "", "ShortId": commit.oid[:8]}})


@route("GET", MS + "/models/{id}/repo")
def ms_file(h: Handler, id: str) -> None:
    commit = h.commit_at(h.readable(id), h.query.get("Revision", "master"))
    entry = commit.tree.get(h.query["FilePath"])
    if entry is None:
        raise Failure(404, "file not found")
    if entry.lfs and h.hub.redirect:
        h.reply(302, b"", {"Location": f"{h.hub.cdn}/cdn/{entry.sha256}?auth_key=x"})
    else:
        h.serve(entry.sha256, {})


@route("POST", MS + "/repos/models/{id}/info/lfs/objects/batch")
def ms_batch(h: Handler, id: str) -> None:
    h.need_write()
    h.repo(id)
    answer(h, {"objects": [lfs_object(h, o) for o in json.loads(h.body())["objects"]]})


@route("POST", MS + "/repos/models/{id}/commit/{rev}")
def ms_commit(h: Handler, id: str, rev: str) -> None:
    h.need_write()
    repo, asked = h.repo(id), json.loads(h.body())
    add: dict[str, Entry] = {}
    delete = [a["path"] for a in asked["actions"] if a["action"] == "delete"]
    for action in asked["actions"]:
        if action["action"] == "delete":
            continue
        if action["type"] == "lfs":
            if action["sha256"] not in h.hub.objects:
                raise Failure(400, "lfs object missing")
            add[action["path"]] = h.hub.entry(action["path"], action["sha256"])
        else:
            add[action["path"]] = h.hub.store(action["path"], base64.b64decode(action["content"]))
    with h.hub.lock:
        branch = {"master": "main"}.get(rev, rev)
        h.commit_at(repo, branch)
        made = h.hub.commit(repo, branch, add, asked["commit_message"], delete)
    answer(h, {"oid": made.oid})
