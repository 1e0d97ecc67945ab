"""The roles of the control plane, and the one command that each is.

In charge of what is run; ``config.up`` runs them on this machine, and the files in ``deploy/`` say the same commands,
which a test compares.  Not in charge of settings: every role reads the same environment (``config.env``), and the web
server's own settings travel in ``GRANIAN_*`` variables, so that its command is the same everywhere too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

#: Every queue, in the order in which a worker of all of them serves: a command waits for nobody's disk.
QUEUES = ("executions", "devboxes", "hosts", "snapshots")

#: Long-polls are requests in flight, so the limits are far above the defaults; idle ones cost no thread. Of headers a
#: few bytes of HTTP/2 can make as many as are allowed, in each stream, before anybody is asked who they are.
_WEB = (
    "python", "-m", "granian", "--interface", "asgi", "--http", "auto", "--loop", "uvloop",
    "--backlog", "16000", "--backpressure", "16000", "--http2-max-concurrent-streams", "1000",
    "--http2-max-headers-size", "262144", "--respawn-failed-workers",
    "--workers-kill-timeout", "10", "config.asgi:application",
)  # fmt: skip

ROLES: Mapping[str, tuple[str, ...]] = {
    "web": _WEB,
    "worker": (
        "python",
        "-m",
        "celery",
        "-A",
        "config",
        "worker",
        "-Q",
        ",".join(QUEUES),
        "--without-mingle",
        "--without-gossip",
        "--loglevel",
        "INFO",
    ),
    # The schedule is in memory: every entry is a short interval, and a file would be one more thing to lose or to
    # share.
    "beat": ("python", "-m", "celery", "-A", "config", "beat", "-S", "celery.beat.Scheduler", "--loglevel", "INFO"),
    "watcher": ("python", "manage.py", "watch_hosts"),
    "ssh": ("python", "manage.py", "serve_ssh"),
}


def web_settings(bind: str, workers: int | None = None) -> dict[str, str]:
    """The environment that Granian reads its address and its number of processes from.  ``bind`` is ``host:port``."""
    host, _, port = bind.rpartition(":")
    count = workers or max(1, min(4, len(os.sched_getaffinity(0))))
    return {"GRANIAN_HOST": host.strip("[]"), "GRANIAN_PORT": port, "GRANIAN_WORKERS": str(count)}


def tls_settings(bind: str, certificate: str, key: str) -> dict[str, str]:
    """As ``web_settings``, of a second web server with TLS: the same application, HTTP/1.1 and HTTP/2 by ALPN."""
    count = max(1, min(2, len(os.sched_getaffinity(0)) // 2))
    shown = {"GRANIAN_SSL_CERTIFICATE": certificate, "GRANIAN_SSL_KEYFILE": key, "GRANIAN_SSL_PROTOCOL_MIN": "tls1.2"}
    return {**web_settings(bind, count), **shown}
