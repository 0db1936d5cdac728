"""An OpenAI-compatible server that answers as a script says: right, wrong, half, or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any] | str | bytes | int]


def said(
    content: str = "",
    reasoning: str = "",
    calls: list[tuple[str, str]] | None = None,
    field: str = "reasoning_content",
) -> dict[str, Any]:
    """A whole answer; calls: name and arguments. field: where the thinking is; vLLM 0.26 says `reasoning`."""
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls or [])
    ]
    message = {"role": "assistant", "content": content, field: reasoning, "tool_calls": made or None}
    return {"choices": [{"message": message, "finish_reason": "tool_calls" if made else "stop"}]}


def events(body: dict[str, Any]) -> bytes:
    """The same as a stream, its arguments in two pieces."""
    message, finish = body["choices"][0]["message"], body["choices"][0]["finish_reason"]
    deltas: list[dict[str, Any]] = [{name: message[name]} for name in message if name.startswith("reasoning")]
    deltas += [{"content": letter} for letter in message["content"]]
    for i, call in enumerate(message["tool_calls"] or []):
        name, text = call["function"]["name"], call["function"]["arguments"]
        deltas.append({"tool_calls": [{"index": i, "function": {"name": name, "arguments": text[:3]}}]})
        deltas.append({"tool_calls": [{"index": i, "function": {"arguments": text[3:]}}]})
    rows = [{"choices": [{"delta": d, "finish_reason": None}]} for d in deltas]
    rows.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    return b"".join(b"data: " + json.dumps(row).encode() + b"\n\n" for row in rows) + b"data: [DONE]\n\n"


class ChatServer:
    """answer: a body, text in its place, bytes that are cut, or an HTTP status.

    models: what it lists, the body in its place, or the HTTP status that it lists them with.
    asked: the requests as they came, with their keys.
    """

    def __init__(self, answer: Answer, models: list[str] | bytes | int | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if isinstance(models, int):
                    return self.reply(models, b"no")
                if isinstance(models, bytes):
                    return self.reply(200, models)
                names = ["tiny"] if models is None else models
                self.reply(200, json.dumps({"data": [{"id": name} for name in names]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.add(self.headers.get("Authorization", ""))
                outer.asked.append(body)
                made = answer(body)
                if isinstance(made, int):
                    self.reply(made, b"no")
                elif isinstance(made, str):
                    self.reply(200, made.encode())
                elif isinstance(made, bytes):
                    self.reply(200, made, length=len(made) + 100)  # more is promised than comes
                else:
                    self.reply(200, events(made) if body["stream"] else json.dumps(made).encode())

            def reply(self, status: int, data: bytes, length: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
