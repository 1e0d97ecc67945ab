"""`manage.py watch_hosts`: the watcher role. Any number of replicas share the hosts."""

from __future__ import annotations

import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand

from hosts.watcher import Watcher


class Command(BaseCommand):
    """Runs until SIGTERM or SIGINT."""

    help = "Hear the hosts: heartbeats, exits, ends of boxes. Run as many replicas as you like."

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it, and give the leases back at the end."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        Watcher().run(stop)
