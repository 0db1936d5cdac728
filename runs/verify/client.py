"""Ask an OpenAI-compatible server: one reply to one request, with a deadline, a limit, and retries.

The server is hostile until checked: it may hang, send half of an answer or endless bytes, or something else than JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from mmquant.errors import InputError, MmquantError

from ...convert.files.parse import is_list, is_object, parse_any, short
from ...convert.hub.http import reason
from .judge import Reply, read_reply

LIMIT = 16 << 20  # bytes of one answer
RETRY = {408, 409, 425, 429, 500, 502, 503, 504}
CONNECT = 10.0  # seconds
REFUSED = "connection refused"
START = "start one (vllm serve DIR, llama-server -m FILE), or give --model and --engine in place of the URL"


class AskError(Exception):
    """A request without a usable answer. again: whether another try may help."""

    def __init__(self, message: str, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Server:
    """Where to ask. url: up to and with /v1; key: sent as a bearer token; timeout: seconds for a whole answer."""

    url: str
    model: str
    key: str = ""
    timeout: float = 600.0
    stream: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def ask(self, body: dict[str, Any]) -> Reply:
        """The reply to one request. AskError when there is none."""
        sent = {"model": self.model, "stream": self.stream, **body}
        try:
            with self._post(sent) as response:
                if response.status_code != 200:
                    said = short(b"".join(_pieces(response, self.timeout))[:200].decode("utf-8", "replace"))
                    raise AskError(f"HTTP {response.status_code}: {said}", response.status_code in RETRY)
                pieces = _pieces(response, self.timeout)
                return _streamed(pieces) if self.stream else _whole(pieces)
        except requests.RequestException as error:
            raise AskError(reason(error)) from None

    def _post(self, sent: dict[str, Any]) -> requests.Response:
        return requests.post(
            f"{self.url}/chat/completions",
            json=sent,
            headers=self.headers,
            timeout=(CONNECT, self.timeout),
            stream=True,
            allow_redirects=False,  # the key is for this server
        )


def _pieces(response: requests.Response, seconds: float) -> Iterator[bytes]:
    """The body as it comes, within the deadline and the limit. AskError beyond them."""
    end, size = time.monotonic() + seconds, 0
    for piece in response.iter_content(1 << 14):
        size += len(piece)
        if size > LIMIT:
            raise AskError(f"more than {LIMIT >> 20} MiB of answer", again=False)
        if time.monotonic() > end:
            raise AskError(f"no whole answer in {seconds:.0f} s")
        yield piece


def find_model(url: str, key: str) -> str:
    """The one model that a server names under /models.

    InputError when it refuses the key, names no model or several; MmquantError when it does not answer.
    """
    place = f"{url}/models"
    status, body = _get(place, key)
    if status in (401, 403):
        had = "was refused" if key else "is missing"
        raise InputError(f"{place}: HTTP {status}, the key {had}; --key-variable names what holds it")
    data: object = parse_any(body, place) if status == 200 else None
    listed: object = data.get("data") if is_object(data) else None
    names = [str(m["id"]) for m in listed if is_object(m) and "id" in m] if is_list(listed) else []
    if len(names) != 1:
        found = f"HTTP {status}" if status != 200 else f"models {', '.join(names) or 'none'}"
        raise InputError(f"{place}: {found}, expected one model; name it with --served-model")
    return names[0]


def _get(place: str, key: str) -> tuple[int, bytes]:
    """Status and body of a server's answer. MmquantError where there is none, or the server says that it fails."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with requests.get(place, headers=headers, timeout=CONNECT, allow_redirects=False, stream=True) as response:
            if response.status_code < 500:
                return response.status_code, b"".join(_pieces(response, CONNECT))
            found = f"HTTP {response.status_code}"
    except requests.RequestException as error:
        found = reason(error)
    except AskError as error:
        found = str(error)
    found, more = ("nothing listens there", f"; {START}") if found == REFUSED else (found, "")
    raise MmquantError(f"{place}: {found}, expected an OpenAI-compatible server{more}")


def base_url(typed: str) -> str:
    """http(s)://HOST[:PORT]/v1 of what was typed. InputError."""
    parts = urlsplit(typed if "://" in typed else f"http://{typed}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise InputError(f"{typed}: expected http://HOST:PORT or https://HOST/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _whole(pieces: Iterator[bytes]) -> Reply:
    text = b"".join(pieces)
    try:
        body: object = json.loads(text)
    except (ValueError, RecursionError):
        raise AskError(f"an answer that is no JSON: {short(text[:100].decode('utf-8', 'replace'))}") from None
    try:
        return read_reply(body if is_object(body) else {})
    except (ValueError, TypeError) as error:
        raise AskError(f"an answer with {error}") from None


def _streamed(pieces: Iterator[bytes]) -> Reply:
    """The reply of a stream of server-sent events. One that ends before it said why is none."""
    text: dict[str, str] = {"content": "", "reasoning": ""}
    calls: dict[int, list[str]] = {}
    finish = ""
    for event in _events(pieces):
        choices: object = event.get("choices")
        choice: object = choices[0] if is_list(choices) and choices else None
        if not is_object(choice):
            continue  # usage comes without choices
        finish = str(choice.get("finish_reason") or finish)
        delta: object = choice.get("delta")
        if is_object(delta):
            text["content"] += str(delta.get("content") or "")
            text["reasoning"] += str(delta.get("reasoning_content") or delta.get("reasoning") or "")
            _add_calls(calls, delta.get("tool_calls"))
    if not finish:
        raise AskError("a stream that ended without finish_reason")
    return Reply(text["content"], text["reasoning"], tuple((c[0], c[1]) for _, c in sorted(calls.items())), finish)


def _add_calls(calls: dict[int, list[str]], deltas: object) -> None:
    for delta in deltas if is_list(deltas) else []:
        function: object = delta.get("function") if is_object(delta) else None
        if is_object(delta) and is_object(function):
            index = delta.get("index")
            call = calls.setdefault(index if isinstance(index, int) else 0, ["", ""])
            call[0] += str(function.get("name") or "")
            call[1] += str(function.get("arguments") or "")


def _events(pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            try:
                event: object = json.loads(data)
            except (ValueError, RecursionError):
                raise AskError("an event that is no JSON") from None
            if is_object(event):
                yield event
