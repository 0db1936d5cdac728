"""HTTP client for both hubs: tokens stay with their host, retries obey the server, errors take one line.

`requests` is the library because modelscope-hub already brings it; huggingface_hub changed its own between 1.x and 2.x.
Redirects are followed here, by hand, so that what crosses to another host is decided in one place.
"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from traceback import walk_tb
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from mmquant.errors import InputError

from .interface import Hub
from .options import Retry

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
NETWORK_ERRORS = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError, TimeoutError)
MAX_REDIRECTS = 8
UNRESOLVED = "the host name does not resolve"
LONGEST_WAIT = 1800.0  # seconds; ModelScope's own client waits as long
log = logging.getLogger("mmquant.hub")
AGENT = {"User-Agent": "mmquant; python-requests", "Accept-Encoding": "identity"}


class HubError(InputError):
    """What the user can put right: a name, a revision, access, an offline switch."""


class TransferError(OSError):
    """What the network or the hub did, after all retries."""


@dataclass(frozen=True)
class Endpoint:
    """Where a hub is and who asks. The token has no place in any text made of this object."""

    hub: Hub
    url: str
    token: str | None = field(default=None, repr=False)

    @property
    def offline(self) -> bool:
        """Whether the user has forbidden to reach it."""
        return self.hub.offline


MISREAD = (TypeError, ValueError, LookupError, AttributeError)


def misread(error: Exception, library: str) -> str:
    """What to say of an error inside a hub's client, as an answer of another form makes it; others are raised again."""
    rooms = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    own = max((place for place, room in enumerate(rooms) if room == "mmquant"), default=-1)
    if library not in rooms[own + 1 :]:
        raise error
    found = " ".join(repr(error).split())[:120]
    return f"the hub answers otherwise than its client expects ({found})"


def origin(url: str) -> tuple[str, str | None, int | None]:
    """(scheme, host, port): what decides whether a token may go along."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def redact(text: str, token: str | None) -> str:
    """`text` without the token and without the signatures of presigned URLs, in one line."""
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\?[^\s'\")]*", "?...", text)
    return " ".join(text.split())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: Retry-After (seconds or date), or Hugging Face's `ratelimit: "api";r=0;t=N`."""
    value = headers.get("Retry-After", "").strip()
    if value:
        if re.fullmatch("[0-9]+", value):
            return float(value)
        try:
            when = email.utils.parsedate_to_datetime(value).timestamp()
        except (TypeError, ValueError, OverflowError):
            when = time.time()
        return max(0.0, when - time.time())
    if match := re.search(r";\s*t=([0-9]+)", headers.get("ratelimit", "")):
        return float(match[1])
    return None


def content_length(headers: Mapping[str, str]) -> int | None:
    """The body's length as announced, None when it is not announced or not a number."""
    value = headers.get("Content-Length", "").strip()
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else None


def whole_body(response: requests.Response, limit: int, what: str) -> bytes:
    """The body as sent (nothing is unpacked); TransferError beyond `limit` bytes, of which no more are ever held."""
    announced = content_length(response.headers)
    data = b"" if announced is not None and announced > limit else response.raw.read(limit + 1)
    response.close()
    if len(data) > limit or (announced or 0) > limit:
        raise TransferError(f"{what}: the server sends {announced or 'more'} bytes, expected at most {limit:,}")
    return data


def joined(url: str, location: str) -> str:
    """Where a server's answer sends us; TransferError unless that is an address of http or https."""
    try:
        target = urljoin(url, location)
        scheme, host, _ = origin(target)
    except ValueError:
        scheme, host, target = "", None, ""
    if scheme not in ("http", "https") or not host or not target.isprintable():
        raise TransferError(f"{urlsplit(url).hostname} sends us to {location[:80]!r}, expected an address of https")
    return target


class _Session(requests.Session):
    """Never looks at where a redirect leads, not even to note it: a hostile address raises in there."""

    def resolve_redirects(self, *args: object, **kwargs: object) -> Iterator[requests.Response]:  # type: ignore[override]
        return iter(())


class Client:
    """Requests to one hub: retried, redirected and explained. One session a thread."""

    def __init__(self, endpoint: Endpoint, retry: Retry | None = None) -> None:
        self.endpoint = endpoint
        self.retry = retry or Retry()
        self.cancelled = threading.Event()
        self._local = threading.local()

    @property
    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = _Session()
        return self._local.session

    def pause(self, attempt: int, asked: float | None = None) -> None:
        """Wait before another attempt; ends at once when the work is cancelled."""
        wait = min(self.retry.cap, self.retry.base * 2.0**attempt) * random.uniform(0.5, 1.0)
        if asked is not None:
            if asked > LONGEST_WAIT:
                raise TransferError(f"the hub asks to wait {asked:.0f} s, run the command again later")
            wait = asked + random.uniform(0, self.retry.base)
        if self.cancelled.wait(wait):
            raise TransferError("cancelled")

    def once(self, method: str, url: str, headers: dict[str, str], body: object = None) -> requests.Response:
        """One request, redirects followed by hand, body unread. The token goes to the endpoint's origin only."""
        if self.endpoint.offline:
            switch = self.endpoint.hub.offline_variable
            raise HubError(f"{self.endpoint.url}: {switch} is set, unset it to reach the hub")
        for _ in range(MAX_REDIRECTS):
            sent = {**AGENT, **headers}
            if self.endpoint.token and origin(url) == origin(self.endpoint.url):
                sent["Authorization"] = f"Bearer {self.endpoint.token}"
                sent |= self.endpoint.hub.token_headers(self.endpoint.token)
            response = self._session.request(
                method,
                url,
                headers=sent,
                data=body,  # type: ignore[arg-type]
                stream=True,
                allow_redirects=False,
                timeout=(min(30.0, self.retry.stall), self.retry.stall),
                auth=_no_netrc,
            )
            self._session.cookies.clear()
            log.debug("%s %s: %d", method, urlsplit(url)._replace(query="").geturl(), response.status_code)
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            response.close()
            target = joined(url, response.headers.get("Location", ""))
            if origin(url)[0] == "https" and origin(target)[0] != "https":
                raise TransferError(f"{urlsplit(url).hostname} redirects to an address without https, refused")
            url = target
        raise TransferError(f"{urlsplit(url).hostname}: more than {MAX_REDIRECTS} redirects")

    def send(
        self, method: str, url: str, headers: dict[str, str] | None = None, *, what: str, body: object = None
    ) -> requests.Response:
        """A request repeated until it is answered; any status that is no failure of the moment is returned.

        Raises TransferError when attempts are used up. `what` names the thing in the error.
        """
        trouble = ""
        for attempt in range(self.retry.attempts + 1):
            asked = None
            try:
                response = self.once(method, url, headers or {}, body)
            except NETWORK_ERRORS as error:
                trouble = reason(error)
                if attempt and trouble == UNRESOLVED:
                    raise TransferError(
                        f"{what}: {urlsplit(url).hostname}: {trouble}, is this machine online?"
                    ) from None
            else:
                if response.status_code not in TRANSIENT:
                    return response
                trouble, asked = f"HTTP {response.status_code}", retry_after(response.headers)
                response.close()
                if asked is not None and asked > LONGEST_WAIT:
                    raise TransferError(f"{what}: the hub asks to wait {asked:.0f} s, run the command again later")
            if attempt < self.retry.attempts:
                self.pause(attempt, asked)
        raise TransferError(
            f"{what}: {trouble} after {self.retry.attempts + 1} attempts; run the command again to continue"
        )

    def get(self, url: str, *, what: str, limit: int) -> tuple[bytes, requests.Response]:
        """A whole body in memory, at most `limit` bytes (listings, small files); one that breaks off is asked again.

        Raises HubError or TransferError for a status other than 200 and 206, TransferError for a longer body.
        """
        for attempt in range(self.retry.attempts + 1):
            response = self.send("GET", url, what=what)
            if response.status_code not in (200, 206):
                raise explain(response, self.endpoint, what)
            try:
                data = whole_body(response, limit, what)
                if len(data) == (content_length(response.headers) or len(data)):
                    return data, response
            except NETWORK_ERRORS:
                pass
            if attempt < self.retry.attempts:
                self.pause(attempt)
        raise TransferError(f"{what}: the connection breaks off before the end, {self.retry.attempts + 1} attempts")


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    # Any `auth` keeps requests from putting ~/.netrc credentials over ours.
    return request


def reason(error: BaseException) -> str:
    """A network error in a few words, without addresses."""
    text = str(error)
    if isinstance(error, (requests.ReadTimeout, TimeoutError)) or "timed out" in text:
        return "no bytes arrived in time"
    if "refused" in text:
        return "connection refused"
    if "resolve" in text or "Name or service" in text or "getaddrinfo" in text:
        return UNRESOLVED
    return f"connection lost ({type(error).__name__})"


def explain(response: requests.Response, endpoint: Endpoint, what: str) -> HubError | TransferError:
    """The error for a refusal, with what to do about it; closes the response."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    response.close()
    variable, login = endpoint.hub.token_variable, endpoint.hub.login
    signed_in = (
        f"{variable} or the stored login is sent" if endpoint.token else f"no token: set {variable} or run `{login}`"
    )
    if code == "GatedRepo":
        return HubError(f"{what}: gated (HTTP {status}), accept its conditions on {endpoint.url} first; {signed_in}")
    if code == "RevisionNotFound":
        return HubError(f"{what}: no such revision (HTTP {status}), expected a branch, tag or commit that exists")
    if code == "EntryNotFound":
        return HubError(f"{what}: no such file (HTTP {status})")
    if status == 404 or code == "RepoNotFound":
        return HubError(
            f"{what}: not found (HTTP {status}), check the name; a private repository needs access; {signed_in}"
        )
    if status in (401, 403):
        return HubError(f"{what}: no access (HTTP {status}); {signed_in}")
    return TransferError(f"{what}: the hub answers HTTP {status}, expected 200")
