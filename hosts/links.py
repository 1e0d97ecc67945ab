"""The connections of this process to hosts, for threads: pooled, capped, and given up on in time.

In charge of which Transport a call goes over (control and bulk apart, bulk spread over several), of dialling again,
of waking a dead hostd, of the circuit breaker and of the cap on calls at once. Knows no verb; `hosts.client` does.
The event loop's are in `hosts.loop_links`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from django.db import connection

from accounts.sealing import SealBroken, unseal
from hosts import ssh
from hosts.errors import HostUnreachable
from hosts.policy import policy

CALLS_AT_ONCE: Final = 12
"""Short calls to one host from one process; below a worker's threads, so a stuck host leaves some for others."""
STREAMS_AT_ONCE: Final = 64
SLOT_SECONDS: Final = 1.0
"""How long a call waits for one of those."""
BULK_TRANSPORTS: Final = 4
CHANNELS_EACH: Final = 200
"""sshd's cost per wake grows with its open channels; the next bulk Transport is dialled at this many."""
KEPT_CHANNELS: Final = 48
"""Channels that wait for the next call instead of being closed: opening one costs a round trip and, on the host, more
than a short call itself."""
WHERE_SECONDS: Final = 2.0
WHERE_NEW_SECONDS: Final = 0.2
"""Older than this, what the row says is read anew before a call is refused by it."""
REFUSED_PAUSES: Final = (0.02, 0.06)
"""Pauses (times 0.5..1.5) before a refused socket is believed: a full backlog refuses at once, too."""
FAIR_SECONDS: Final = 1.0
"""A connection is given up only when it had this long to answer, however little of a call's time was left."""
BREAK_AT: Final = 4
OPEN_SECONDS: Final = (0.5, 10.0)
TRIAL_SECONDS: Final = 5.0


class Broken(Exception):
    """The circuit is open; the text says since what and for how long."""


class Breaker:
    """Stops calls to a host that fails, so that it holds no threads; lets one through now and then to see.

    A failure weighs 1 when it may have been one slow verb and 2 when the host gave no sign of life; at 4 in a row the
    circuit opens for 0.5 s, doubling up to 10 s with each trial that fails. Calls that were under way when it opened
    are the same trouble, however many. A host that the watcher calls silent gets single trials only, and all is
    forgotten once the watcher hears it again. Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._weight = 0
        self._opened = 0
        self._until = 0.0
        self._trusted_until = 0.0
        self._reason = ""
        self._silent = False
        self._trial = False

    def check(self, silent_for: float | None = None) -> None:
        """Raise Broken unless a call may be made now. `silent_for`: seconds since the watcher last heard the host."""
        now = self._clock()
        limit = policy().silent_after
        with self._lock:
            if silent_for is not None and silent_for > limit and now > self._trusted_until:
                self._silent = True
                if self._weight < BREAK_AT:
                    self._weight = BREAK_AT
                    self._reason = f"silent for {silent_for:.0f} s"
                    self._until = now
            elif self._silent and silent_for is not None and silent_for <= limit:
                self._silent = False
                self._weight = self._opened = 0
            if self._weight < BREAK_AT:
                return
            if now < self._until:
                raise Broken(f"not dialled for another {self._until - now:.1f} s after: {self._reason}")
            self._until = now + TRIAL_SECONDS  # this caller is the trial; the others wait for how it goes
            self._trial = True

    def worked(self) -> None:
        """A call was answered."""
        if self._weight or self._opened or self._clock() > self._trusted_until - 1:
            with self._lock:
                self._weight = self._opened = 0
                self._until = 0.0
                self._trial = False
                self._trusted_until = self._clock() + policy().silent_after

    def failed(self, reason: str, weight: int) -> None:
        """A call was not answered."""
        now = self._clock()
        with self._lock:
            was_open = self._weight >= BREAK_AT
            if was_open and not self._trial:
                return
            self._trial = False
            self._weight += weight
            self._reason = reason
            if self._weight >= BREAK_AT:
                pause = min(OPEN_SECONDS[1], OPEN_SECONDS[0] * 2**self._opened)
                self._opened = min(self._opened + 1, 10)
                until = now + pause * random.uniform(0.75, 1.25)  # noqa: S311  (spread, not secrecy)
                self._until = until if was_open else max(until, self._until)


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """What the row says about reaching a host. `silent_for`: seconds, None when it was never heard."""

    login: ssh.Login
    socket_path: str
    silent_for: float | None


def where_is(host_id: str) -> Where:
    """Read it from the row. Raises HostUnreachable when there is no such host or no login yet."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT address, port, link_user, link_key_sealed, host_key, socket_path,"
            " extract(epoch FROM clock_timestamp() - seen_at)::float FROM hosts_host"
            " WHERE id = %s AND state <> 'retired'",
            [host_id],
        )
        row = cursor.fetchone()
    if row is None:
        raise HostUnreachable(host_id, "no such host, or it is retired")
    address, port, user, sealed, host_key, socket_path, silent_for = row
    if not sealed or not socket_path:
        raise HostUnreachable(host_id, "its enrolment has not come as far as a login")
    try:
        private_key = str(unseal(sealed))
    except SealBroken as error:
        raise HostUnreachable(host_id, f"its key cannot be unsealed: {error}") from error
    return Where(ssh.Login(address, port, user, private_key, host_key), socket_path, silent_for)


class Link:
    """The connections of this process to one host. Thread-safe."""

    def __init__(self, host_id: str, locate: Callable[[str], Where] = where_is) -> None:
        self.host_id = host_id
        self.breaker = Breaker()
        self._locate = locate
        self._calls = threading.BoundedSemaphore(CALLS_AT_ONCE)
        self._streams = threading.BoundedSemaphore(STREAMS_AT_ONCE)
        self._lock = threading.Lock()
        self._dialling = threading.Lock()
        self._control: ssh.HostTransport | None = None
        self._bulk: list[ssh.HostTransport] = []
        self._kept: list[tuple[str, ssh.ThreadStream]] = []
        self._where: Where | None = None
        self._where_at = 0.0

    def where(self, *, fresh: bool = False) -> Where:
        """What the row says, at most 2 s old."""
        where = self._where
        if where is None or fresh or time.monotonic() - self._where_at > WHERE_SECONDS:
            where = self._locate(self.host_id)
            self._where, self._where_at = where, time.monotonic()
        return where

    @contextlib.contextmanager
    def slot(self, *, bulk: bool = False) -> Iterator[None]:
        """One of the calls at once. Raises HostUnreachable when none comes free in time."""
        gate, limit = (self._streams, STREAMS_AT_ONCE) if bulk else (self._calls, CALLS_AT_ONCE)
        if not gate.acquire(timeout=SLOT_SECONDS):
            raise HostUnreachable(self.host_id, f"{limit} calls of this process are waiting for it already")
        try:
            yield
        finally:
            gate.release()

    def open(
        self, deadline: float, *, bulk: bool = False, window: int = ssh.WINDOW, kept_for: str | None = None
    ) -> ssh.ThreadStream:
        """A channel to hostd, on a live connection. Raises HostUnreachable; counts for the breaker.

        A fresh one, or with `kept_for` (see `keep`) one that is there already. A connection found dead is dialled again
        once; a refused socket is tried again with jitter, then hostd is started over the admin login, then tried until
        the deadline.
        """
        where = self.where()
        try:
            try:
                self.breaker.check(where.silent_for)
            except Broken:
                if time.monotonic() - self._where_at < WHERE_NEW_SECONDS:
                    raise
                where = self.where(fresh=True)  # it may have been heard just now, and the caller was woken for that
                self.breaker.check(where.silent_for)
        except Broken as broken:
            raise HostUnreachable(self.host_id, str(broken)) from None
        if kept_for is not None and (kept := self._take(kept_for)) is not None:
            return kept
        try:
            return self._open(where, deadline, bulk, window)
        except ssh.SshError as error:
            self.breaker.failed(str(error), 2)
            raise HostUnreachable(self.host_id, str(error)) from error
        except HostUnreachable as error:
            self.breaker.failed(error.reason, 2)
            raise

    def _open(self, where: Where, deadline: float, bulk: bool, window: int) -> ssh.ThreadStream:
        refused, redialled, woken = 0, False, False
        while True:
            transport = self._transport(where, deadline, bulk)
            began = time.monotonic()
            try:
                return transport.open_stream(where.socket_path, deadline, window)
            except ssh.ConnectionCut:
                self.drop(transport)
                if redialled:
                    raise
                redialled = True
            except ssh.TimedOut:
                if time.monotonic() - began > FAIR_SECONDS:  # an open takes a millisecond: nobody is there
                    self.drop(transport)
                raise
            except ssh.SocketRefused:
                if refused >= len(REFUSED_PAUSES):
                    if time.monotonic() + 0.2 > deadline:
                        raise
                    if not woken:
                        from hosts.revival import revive  # it needs the admin login, which needs this module

                        revive(self.host_id, deadline)
                        woken = True
                pause = REFUSED_PAUSES[min(refused, len(REFUSED_PAUSES) - 1)]
                refused += 1
                time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311

    def keep(self, stream: ssh.ThreadStream, box: str) -> None:
        """Keep a channel whose last answer was complete for the next call to the same box, or to the host ("")."""
        with self._lock:
            self._kept = [(name, other) for name, other in self._kept if other.is_open]
            self._kept.append((box, stream))
            extra = self._kept.pop(0)[1] if len(self._kept) > KEPT_CHANNELS else None
        if extra is not None:
            extra.close()

    def _take(self, box: str) -> ssh.ThreadStream | None:
        """The channel used last for that box, else one of the host's own, which may become any box's."""
        with self._lock:
            for wanted in dict.fromkeys((box, "")):
                for place in reversed(range(len(self._kept))):
                    if self._kept[place][0] == wanted and self._kept[place][1].is_open:
                        return self._kept.pop(place)[1]
        return None

    def _transport(self, where: Where, deadline: float, bulk: bool) -> ssh.HostTransport:
        found = self._live(bulk)
        if found is not None:
            return found
        # One dials, the others wait for it: sshd's MaxStartups drops dials that come at once.
        if not self._dialling.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ssh.TimedOut("the deadline passed while another thread was dialling")
        try:
            found = self._live(bulk)
            if found is not None:
                return found
            transport = dial_with_jitter(lambda left: ssh.dial(where.login, left), deadline)
            with self._lock:
                if bulk:
                    self._bulk.append(transport)
                else:
                    self._control = transport
            return transport
        finally:
            self._dialling.release()

    def _live(self, bulk: bool) -> ssh.HostTransport | None:
        with self._lock:
            if not bulk:
                return self._control if self._control is not None and self._control.active else None
            self._bulk = [transport for transport in self._bulk if transport.active]
            if not self._bulk:
                return None
            least = min(self._bulk, key=lambda transport: transport.channels)
            full = least.channels >= CHANNELS_EACH and len(self._bulk) < BULK_TRANSPORTS
            return None if full else least

    def drop(self, transport: ssh.HostTransport) -> None:
        """Close a connection that proved dead; the next call dials."""
        with self._lock:
            if self._control is transport:
                self._control = None
            self._bulk = [other for other in self._bulk if other is not transport]
            self._where = None
        transport.close()

    def unanswered(self, stream: ssh.ThreadStream, since: float, error: ssh.SshError) -> None:
        """A call over that stream got no answer: tell the breaker, and give up a connection that went quiet."""
        transport = stream.transport
        if not transport.active:
            self.drop(transport)
            self.breaker.failed(str(error), 1)  # cut: the dial that follows tells more
        elif transport.heard_at < since and time.monotonic() - since > FAIR_SECONDS:
            self.drop(transport)
            self.breaker.failed(str(error), 2)
        else:
            self.breaker.failed(str(error), 1)

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            transports = [*self._bulk, *([self._control] if self._control else [])]
            self._bulk, self._control, self._where, self._kept = [], None, None, []
        for transport in transports:
            transport.close()


def dial_with_jitter(dial: Callable[[float], ssh.HostTransport], deadline: float) -> ssh.HostTransport:
    """Dial up to three times before the deadline; only a failed dial is tried again, never a refused login."""
    tries = 3
    while True:
        tries -= 1
        left = deadline - time.monotonic()
        if left <= 0:
            raise ssh.TimedOut("the deadline passed before the host was dialled")
        try:
            return dial(left)
        except ssh.DialFailed:
            # sshd drops dials beyond MaxStartups before its banner; those that come back must not come back together.
            pause = random.uniform(0.05, 0.3)  # noqa: S311
            if tries == 0 or time.monotonic() + pause + 0.2 > deadline:
                raise
            time.sleep(pause)


_links: dict[str, Link] = {}
_links_lock = threading.Lock()


def link_for(host_id: str) -> Link:
    """This process's link to that host. Does not dial."""
    link = _links.get(host_id)
    if link is None:
        with _links_lock:
            link = _links.setdefault(host_id, Link(host_id))
    return link


def forget(host_id: str) -> None:
    """Close the connections to a host that is retired, or that has moved."""
    with _links_lock:
        link = _links.pop(host_id, None)
    if link is not None:
        link.close()


# A Transport's thread does not survive a fork, and its socket must not be shared.
os.register_at_fork(after_in_child=_links.clear)
