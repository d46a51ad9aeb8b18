"""A web server on this machine that misbehaves on request: ignores ranges, breaks off midway, answers 503."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class WebServer:
    files: dict[str, bytes]  # path without its first slash -> content
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes of the body of the next answers, then the line breaks
    refuse: list[int] = field(default_factory=list)  # status codes of the next answers
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range) of every GET
    url: str = ""


@contextmanager
def serving(server: WebServer) -> Iterator[WebServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            server.requests.append((self.path[1:], self.headers.get("Range")))
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            content = server.files.get(self.path[1:])
            if body and server.refuse:
                self.send_error(server.refuse.pop(0))
                return
            if content is None:
                self.send_error(404)
                return
            start, end = 0, len(content)
            wanted = self.headers.get("Range") if server.ranges else None
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last) + 1 if last else end, end)
                if start >= len(content):
                    self.send_error(416)
                    return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{hash(content)}"')
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.end_headers()
            if body and server.break_after:
                self.wfile.write(content[start:end][: server.break_after.pop(0)])
                self.close_connection = True
            elif body:
                self.wfile.write(content[start:end])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{web.server_address[1]}"
        try:
            yield server
        finally:
            web.shutdown()
            thread.join()
