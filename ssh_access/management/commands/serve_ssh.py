"""`manage.py serve_ssh`: the ssh role. Any number of replicas behind a TCP balancer."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import uvloop
from django.core.management.base import BaseCommand, CommandError

from ssh_access.server import Service


class Command(BaseCommand):
    """Runs until SIGTERM or SIGINT."""

    help = "Let people into devboxes by SSH: with TLS and server name as the CLI dials, and on a plain port."

    def handle(self, *args: Any, **options: Any) -> None:
        """Serve, and send everybody away at the end."""
        try:
            uvloop.run(_serve())
        except OSError as error:
            raise CommandError(str(error)) from error


async def _serve() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Service().run(stop)
