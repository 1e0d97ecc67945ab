"""An HTTP server that takes parts and gives ranges as S3 does behind presigned URLs, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PartStore:
    """`parts` by number, as they were put last; `puts` counts uploads of each. `whole` is what is given by ranges."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.puts: list[int] = []
        self.whole = b""
        self.answers: list[tuple[int, str]] = []
        """What the next requests are answered instead, in order."""
        self.slow_seconds = 0.0
        self.stamp = "1"
        """URLs of another stamp have expired."""
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if not self._instead():
                    time.sleep(store.slow_seconds)
                    number = int(self.path.split("/")[2].split("?")[0])
                    store.puts.append(number)
                    store.parts[number] = data
                    self._answer(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

            def do_GET(self) -> None:
                if not self._instead():
                    time.sleep(store.slow_seconds)
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    self._answer(206, store.whole[int(first) : int(last) + 1], {})

            def _instead(self) -> bool:
                if store.answers:
                    status, code = store.answers.pop(0)
                elif self.path.partition("stamp=")[2] != store.stamp:
                    status, code = 403, "AccessDenied</Code><Message>Request has expired</Message><Code>"
                else:
                    return False
                self._answer(status, f"<Error><Code>{code}</Code></Error>".encode(), {})
                return True

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def put_url(self, number: int) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/parts/{number}?stamp={self.stamp}"

    @property
    def get_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/whole?stamp={self.stamp}"

    def join(self) -> bytes:
        """Complete the upload: the whole of the parts."""
        self.whole = b"".join(self.parts[number] for number in sorted(self.parts))
        return self.whole

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
