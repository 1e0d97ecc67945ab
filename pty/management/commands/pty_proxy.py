"""`manage.py pty_proxy --devbox ID`: the devbox's terminals on a port of this machine's loopback, without a key."""

from __future__ import annotations

import asyncio
import signal
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from api.ids import is_id
from pty.proxy import Door, Proxy


class Command(BaseCommand):
    """Runs until SIGTERM or SIGINT."""

    help = (
        "Serve one devbox's terminals on 127.0.0.1, adding your API key, for clients that bring none: "
        "RUNLOOP_PTY_URL=http://127.0.0.1:5000 rli devbox pty ID. The key is RUNLOOP_API_KEY's or a file's."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Which devbox, whose key, where."""
        parser.add_argument("--devbox", required=True, help="the devbox's id (dbx_…)")
        parser.add_argument("--port", type=int, default=5000, help="where to listen; 0 for any free port")
        parser.add_argument("--server", default=f"http://{settings.BERTH.bind}", help="the API's origin")
        parser.add_argument("--key-file", help="read the API key from this file instead of RUNLOOP_API_KEY")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it; what makes no sense is told in one line."""
        if not is_id("dbx", options["devbox"]):
            raise CommandError(f"{options['devbox'][:60]} is no devbox's id")
        server = options["server"].rstrip("/")
        if not server.startswith(("http://", "https://")):
            raise CommandError("--server: an origin such as https://api.example.com")
        try:
            given = options["key_file"]
            key = Path(given).read_text().strip() if given else settings.CLIENT_API_KEY
        except OSError as error:
            raise CommandError(f"--key-file: {error}") from error
        if not key.isascii() or not key.isprintable() or not key:
            raise CommandError("an API key is needed: set RUNLOOP_API_KEY, or name a --key-file")
        try:
            asyncio.run(self._run(Proxy(Door(server, options["devbox"], key)), options["port"]))
        except (OSError, OverflowError) as error:
            raise CommandError(f"cannot listen on 127.0.0.1:{options['port']}: {error}") from error

    async def _run(self, proxy: Proxy, port: int) -> None:
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        found = await proxy.listen(port)
        self.stdout.write(f"RUNLOOP_PTY_URL=http://127.0.0.1:{found}")
        self.stdout.flush()
        await ended.wait()
