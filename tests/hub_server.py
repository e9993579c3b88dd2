"""A server on loopback that speaks the part of the Hugging Face hub's protocol that a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = 10**9


class HubServer:
    """Serves the files of `folder` as `name` at `COMMIT`, which is what its branch `main` and tag `v1` are.

    refuse: path of a request -> (HTTP status, error code of the hub) or None. Weights are sent from another address,
    as the hub does, and only `weight_bytes` of each request before the connection is closed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda _: None
        self.weight_bytes = WHOLE
        self.stall: threading.Event | None = None  # instead of closing the connection: nothing more until it is set
        self.flip = False  # a bit of the weights
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ranges(self) -> list[str | None]:
        """The ranges of the weights that were asked for."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.startswith("/cdn/")]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range")))
        refused = self.refuse(path)
        info = re.fullmatch(rf"/api/models/{self.name}/(revision|tree)/([\w.-]+)", path)
        file = re.fullmatch(rf"(?:/cdn/|/{self.name}/resolve/{COMMIT}/)([\w.-]+)", path)
        if refused is not None:
            self._send(request, refused[0], {"X-Error-Code": refused[1]} if refused[1] else {})
        elif info and info[2] not in ("main", "v1", COMMIT):
            self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        elif info:
            document = self._files() if info[1] == "tree" else {"id": self.name, "sha": COMMIT, "siblings": []}
            self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(document).encode())
        elif file and (self.folder / file[1]).is_file():
            self._send_file(request, self.folder / file[1], from_cdn=path.startswith("/cdn/"))
        else:
            self._send(request, 404, {"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

    def _files(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _sha256(path)}
            for path in sorted(self.folder.iterdir())
        ]

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path, *, from_cdn: bool) -> None:
        size, tag = path.stat().st_size, f'"{_sha256(path)}"'
        if path.suffix == ".safetensors" and not from_cdn:
            headers = {"X-Linked-Size": str(size), "X-Linked-Etag": tag, "X-Repo-Commit": COMMIT}
            self._send(request, 302, {**headers, "Location": f"{self.endpoint}/cdn/{path.name}"})
            return
        body, headers = path.read_bytes(), {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if from_cdn and self.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            body = body[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(request, 206 if asked else 200, headers, body, self.weight_bytes if from_cdn else WHOLE)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes = b"",
        at_most: int = WHOLE,
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[:at_most])
            if at_most < len(body):
                request.wfile.flush()
                if self.stall is not None:
                    self.stall.wait()
                request.close_connection = True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
