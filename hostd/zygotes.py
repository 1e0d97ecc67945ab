"""Having a zygote, and one of our own release.

In charge of: that two processes never start two, and that the boxes of a new release get the keepers of a new release.
Not in charge of: what a zygote does (`zygote`), talking to it (`keeper_spec`), introducing living keepers to a new one
(`keepers.Keepers.zygote_was_replaced`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Iterator

from hostd import keeper_spec
from hostd.bundles import start_time
from hostd.config import HostConfig, write_file

_END_SECONDS = 5.0

log = logging.getLogger("hostd.zygotes")


@contextlib.contextmanager
def zygote(cfg: HostConfig) -> Iterator[socket.socket]:
    """A connection to the zygote, started if there is none. Raises OSError."""
    with _lock(cfg):
        conn = keeper_spec.start_zygote(cfg)
    with conn:
        yield conn


def ensure(cfg: HostConfig, digest: str) -> bool:
    """Have a zygote, of the bundle with this digest. True when one of another release was replaced.

    Called once at the start of hostd, before there are makers. Keepers of the old one live on, and must be introduced.
    A source tree (no digest) takes what is there. Raises OSError, ZygoteError.
    """
    began = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    with zygote(cfg) as conn:
        pid = keeper_spec.zygote_pid(conn)
        has_keepers = bool(keeper_spec.report(conn))
    start = start_time(pid)
    if start is not None and start >= began:
        note(cfg, digest)  # started just now, by us
        return False
    if not digest or _read(cfg) == {"pid": pid, "start": start, "digest": digest}:
        return False
    log.info("zygote %s of another release is replaced", pid)
    _end(pid)
    note(cfg, digest)
    return has_keepers


def note(cfg: HostConfig, digest: str) -> None:
    """Remember of which release the zygote is; it is started if there is none. Raises OSError, ZygoteError."""
    with zygote(cfg) as conn:
        pid = keeper_spec.zygote_pid(conn)
    about = {"pid": pid, "start": start_time(pid), "digest": digest}
    write_file(_path(cfg), json.dumps(about).encode(), mode=0o600)


def _end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not select.select([handle], [], [], _END_SECONDS)[0]:
            raise TimeoutError(f"zygote {pid} is alive {_END_SECONDS:g} s after SIGKILL")
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _path(cfg: HostConfig) -> str:
    return f"{cfg.run}/zygote.json"


def _read(cfg: HostConfig) -> object:
    try:
        with open(_path(cfg), "rb") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def _lock(cfg: HostConfig) -> Iterator[None]:
    # Held while one is started: some tens of milliseconds, bounded by start_zygote itself.
    lock = os.open(f"{cfg.run}/zygote.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
