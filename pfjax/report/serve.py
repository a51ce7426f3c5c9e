"""Serves the page of runs that train, on this machine alone."""

import hashlib
import http.server
from collections.abc import Sequence

from pfjax.report import page, runs

_NAMES = ("127.0.0.1", "localhost")


def make_server(
    paths: Sequence[str], port: int, command: str = ""
) -> http.server.ThreadingHTTPServer:
    """A server of the page of runs, made anew when their files have changed.

    Args:
      paths: folders of runs, see `runs.load`.
      port: to listen on; 0 is any that is free.
      command: what serves the page, for its end.
    """
    made: dict[str, bytes] = {}

    def version() -> str:
        files = [f for folder in runs.find(paths) for f in runs.files(folder)]
        state = [(str(f), f.stat().mtime, f.stat().length) for f in files]
        return hashlib.sha256(repr(state).encode()).hexdigest()[:16]

    def newest() -> bytes:
        now = version()
        if now not in made:
            text = page.render(runs.load(paths), command, now)
            made.clear()
            made[now] = text.encode()
        return made[now]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            # A page elsewhere may have its own name point here, and must learn nothing.
            if self.headers.get("Host", "").partition(":")[0] not in _NAMES:
                self.send_error(403)
            elif self.path == "/":
                self._send(newest(), "text/html; charset=utf-8")
            elif self.path == "/version":
                self._send(version().encode(), "text/plain")
            else:
                self.send_error(404)

        def _send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    newest()  # a mistake is told before the address is
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
