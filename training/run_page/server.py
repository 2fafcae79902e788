"""A page for one reader on this machine, live: one document held in memory, behind a token, on loopback.

Nothing of a request names a file. Who may see the page knows the token in its address, compared in constant time; the
Host header must name this machine, so that a stranger's site cannot reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOOPBACK = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
"""What a browser here, or at the other end of an ssh tunnel, calls this machine; under any port."""
_SECONDS = 30
"""That a client may take to send its request."""


class PageServer:
    """Serves what `current` returns, on a free port, until `close`. Use as a context manager or call `serve`.

    current: the page; called for each request, one at a time.
    """

    def __init__(self, current: Callable[[], bytes]):
        self._current, self._lock = current, threading.Lock()
        self.token = secrets.token_urlsafe(24)
        self._server = ThreadingHTTPServer((LOOPBACK, 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/{self.token}"

    def serve(self) -> None:
        """Until Ctrl-C."""
        self._server.serve_forever()

    def __enter__(self) -> PageServer:
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self.close()

    def close(self) -> None:
        self._server.server_close()

    def page(self) -> bytes:
        with self._lock:
            return self._current()

    def may_see(self, path: str) -> bool:
        return hmac.compare_digest(path.encode("latin-1", "replace"), f"/{self.token}".encode())


def _handler(server: PageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS
        server_version, sys_version = "pixelprune", ""

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def _answer(self, *, has_body: bool) -> None:
            hosts = self.headers.get_all("Host") or [""]
            if len(hosts) != 1 or not HOSTS.fullmatch(hosts[0]):
                return self._say(403, b"this page is for a browser on its own machine\n")
            if not server.may_see(self.path):
                return self._say(404, b"not found\n")
            page = server.page()
            version = f'"{hashlib.sha256(page).hexdigest()}"'
            if self.headers.get("If-None-Match") == version:
                return self._say(304, b"", version=version)
            return self._say(200, page if has_body else b"", "text/html; charset=utf-8", len(page), version)

        def _say(
            self, code: int, body: bytes, kind: str = "text/plain", length: int | None = None, version: str = ""
        ) -> None:
            self.send_response(code)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body) if length is None else length),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Content-Security-Policy": "frame-ancestors 'none'",
            }
            if version:
                headers["ETag"] = version
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The address holds the token: nothing of a request is logged."""

    return Handler
