"""The echo of a key through terminado, the terminals of Jupyter: the baseline of ours, on the same machine.

Run as a program it is the server: ``python -m tests.bench.terminado PORT``.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from websockets.sync.client import ClientConnection, connect

from config.state import CHECKOUT, free_port

START_SECONDS = 20.0


@contextlib.contextmanager
def attached() -> Iterator[ClientConnection]:
    """A terminal of a server that lives as long as the ``with``."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.terminado", str(port)], cwd=CHECKOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket = connect(f"ws://127.0.0.1:{port}/terminal", proxy=None)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the baseline's server did not start") from None
                time.sleep(0.1)
        with socket:
            yield socket
    finally:
        server.terminate()
        server.wait(10)


def send(socket: ClientConnection, text: str) -> None:
    """Type it."""
    socket.send(json.dumps(["stdin", text]))


def received(socket: ClientConnection) -> str:
    """The next that the terminal shows."""
    while True:
        kind, *rest = json.loads(socket.recv(timeout=20))
        if kind == "stdout":
            return str(rest[0])


def serve(port: int) -> None:
    """Serve terminals until ended."""
    import tornado.ioloop
    import tornado.web
    from terminado.management import UniqueTermManager
    from terminado.websocket import TermSocket

    manager: Any = UniqueTermManager(shell_command=["bash"])
    routes: Any = [(r"/terminal", TermSocket, {"term_manager": manager})]
    tornado.web.Application(routes).listen(port, "127.0.0.1")
    tornado.ioloop.IOLoop.current().start()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
