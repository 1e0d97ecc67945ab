"""Hearing of SIGTERM while requests are still being served.

Granian tells an application that it stops (``lifespan.shutdown``) only after its last request has ended, and a stream
or a long-poll does not end by itself. So the worker's signal handler is wrapped: it first tells ``api.stopping``.
"""

from __future__ import annotations

import signal
from typing import Any

from api.stopping import going_down
from api.waiting import hub


def listen_for_stop() -> None:
    """To be called while the application is imported, which is before Granian's worker installs its handlers."""
    try:
        from granian import _signals
    except ImportError:  # another server
        return
    install = _signals.set_loop_signals

    def set_loop_signals(loop: Any) -> Any:
        event = install(loop)  # type: ignore[no-untyped-call]  # granian brings no types

        def stop() -> None:
            going_down.begin()
            hub.wake_all()
            event.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        return event

    _signals.set_loop_signals = set_loop_signals
