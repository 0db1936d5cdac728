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

from mmquant.errors import InputError

from ...convert.files.parse import is_list, is_object, parse_any, short
from .judge import Reply, read_reply

LIMIT = 16 << 20  # bytes of one answer
RETRY = {408, 409, 425, 429, 500, 502, 503, 504}
CONNECT = 10.0  # seconds


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
                    said = short(b"".join(self._pieces(response))[:200].decode("utf-8", "replace"))
                    raise AskError(f"HTTP {response.status_code}: {said}", response.status_code in RETRY)
                return _streamed(self._pieces(response)) if self.stream else _whole(self._pieces(response))
        except requests.RequestException as error:
            raise AskError(f"{type(error).__name__}") from None

    def _post(self, sent: dict[str, Any]) -> requests.Response:
        return requests.post(
            f"{self.url}/chat/completions",
            json=sent,
            headers=self.headers,
            timeout=(CONNECT, self.timeout),
            stream=True,
            allow_redirects=False,  # the key is for this server
        )

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        """The body as it comes, within the deadline and the limit."""
        end, size = time.monotonic() + self.timeout, 0
        for piece in response.iter_content(1 << 14):
            size += len(piece)
            if size > LIMIT:
                raise AskError(f"more than {LIMIT >> 20} MiB of answer", again=False)
            if time.monotonic() > end:
                raise AskError(f"no whole answer in {self.timeout:.0f} s")
            yield piece


def find_model(url: str, key: str) -> str:
    """The one model that a server names under /models. InputError when it names none, or several."""
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = requests.get(f"{url}/models", headers=headers, timeout=CONNECT, allow_redirects=False)
        if response.status_code in (401, 403):
            had = "was refused" if key else "is missing"
            raise InputError(
                f"{url}/models: HTTP {response.status_code}, the key {had}; --key-variable names what holds it"
            )
        data: object = parse_any(response.content[:LIMIT], f"{url}/models") if response.ok else None
    except requests.RequestException as error:
        raise InputError(f"{url}: {type(error).__name__}, expected an OpenAI-compatible server") from None
    listed: object = data.get("data") if is_object(data) else None
    names = [str(m["id"]) for m in listed if is_object(m) and "id" in m] if is_list(listed) else []
    if len(names) != 1:
        found = f"HTTP {response.status_code}" if not response.ok else f"models {', '.join(names) or 'none'}"
        raise InputError(f"{url}/models: {found}, expected one model; name it with --served-model")
    return names[0]


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
