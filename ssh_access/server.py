"""The SSH service: who may come in, and what a connection may ask for.

In charge of the two listeners (TLS, where the server's name says which devbox is meant, and plain, where the user's
name does), of logging in by public key, of bounds on connections, tries, channels and memory, and of stopping. What a
channel carries is `sessions` and `forwards`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import asyncssh
from django.conf import settings

from api.threads import in_database
from ssh_access import services
from ssh_access.forwards import HERE, Forward
from ssh_access.names import devbox_of_host, devbox_of_user
from ssh_access.services import Access
from ssh_access.sessions import BoxSession

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 2000
LOGGING_IN_MAX: Final = 200
"""Connections of nobody yet. One more costs that address the oldest of its own which has most of them, so that whoever
only connects keeps nobody out."""
OF_DEVBOX_MAX: Final = 100
"""Connections to one devbox."""
CHANNELS_MAX: Final = 64
"""Sessions and forwarded connections of one connection."""
TRIES_MAX: Final = 10
LOGIN_SECONDS: Final = 20.0
HANDSHAKE_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 30.0
KEEPALIVES_MISSED: Final = 3
UNSENT_MAX: Final = 32 << 20
"""Bytes that a client has not taken, of answers that no window bounds; then it is cut."""
RECHECK_SECONDS: Final = 10.0
"""How long a key that was revoked may still hold its connection."""
STOP_SECONDS: Final = 5.0
TOLD_SECONDS: Final = 0.3
"""For sessions to hear why they end."""
WINDOW: Final = 1 << 20
CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr")


class Doorman(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, service: Service, *, over_tls: bool) -> None:
        self._service, self._over_tls = service, over_tls
        self._conn: Any = None
        self.access: Access | None = None
        self.address = ""
        self._blob = b""
        self._tries = 0
        self.is_in = False
        self.room = asyncio.Event()
        self.room.set()
        self._open: set[Any] = set()

    def connection_made(self, conn: Any) -> None:
        """Somebody has come."""
        self._conn = conn
        self.address = str((conn.get_extra_info("peername") or ("",))[0])
        if not self._service.admit(self):
            conn.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """And has gone. Of a forwarded connection that is still being dialled only we know."""
        self._service.leave(self)
        for channel in self._open:
            if not channel.is_over:
                channel.connection_lost(exc)

    # --- logging in

    def begin_auth(self, username: str) -> bool:
        """Nobody is let in for a name alone."""
        return True

    def public_key_auth_supported(self) -> bool:
        """Nothing else is."""
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Whether that key opens the devbox that is meant. Raises DisconnectError after too many tries."""
        self._tries += 1
        if self._tries > TRIES_MAX:
            raise asyncssh.DisconnectError(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many keys were tried")
        devbox_id, user = devbox_of_user(username)
        if self._over_tls:
            named = devbox_of_host(getattr(self._conn.get_extra_info("ssl_object"), "asked_for", None) or "")
            if named is not None:
                devbox_id, user = named, username
        self._blob = key.public_data
        self.access = await in_database(services.authorize, devbox_id, user, self._blob)
        return self.access is not None

    def auth_completed(self) -> None:
        """The key was proven."""
        assert self.access is not None
        if not self._service.welcome(self):
            why = f"{OF_DEVBOX_MAX} connections to this devbox are open"
            self._conn.disconnect(asyncssh.DISC_TOO_MANY_CONNECTIONS, why)

    async def check_again(self) -> None:
        """Cut the connection if its key opens nothing any more."""
        if self.access is None:
            return
        user = self.access.user
        if await in_database(services.authorize, self.access.devbox_id, user, self._blob) is None:
            self.disconnect("the key or the devbox has ended")

    # --- what is asked for

    def session_requested(self) -> BoxSession:
        """A session. Raises ChannelOpenError."""
        session = BoxSession(self._known(), self.room, self._peer())
        self._open.add(session)
        return session

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:
        """A forwarded connection. Raises ChannelOpenError unless it leads to the devbox itself."""
        if dest_host.lower() not in HERE or not 1 <= dest_port <= 65535:
            why = f"only the devbox's own localhost can be reached, not {dest_host[:80]}"
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, why)
        forward = Forward(self._known(), self.room)
        self._open.add(forward)
        return forward.dial(dest_port)

    def _known(self) -> Access:
        self._open = {channel for channel in self._open if not channel.is_over}
        if len(self._open) >= CHANNELS_MAX:
            why = f"{CHANNELS_MAX} channels of this connection are open"
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, why)
        if self.access is None or self._service.stopping:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "not now")
        return self.access

    def _peer(self) -> str:
        """What sshd tells programs in SSH_CONNECTION."""
        places = (self._conn.get_extra_info("peername"), self._conn.get_extra_info("sockname"))
        return " ".join(f"{place[0]} {place[1]}" for place in places if place)

    # --- called by the service

    def unsent(self) -> int:
        """Bytes that wait for the client."""
        transport = self._conn._transport
        return int(transport.get_write_buffer_size()) if transport is not None else 0

    def disconnect(self, why: str) -> None:
        """End it with a reason, which each session is told: people see it there, and programs in a status of 255."""
        for channel in self._open:
            channel.refuse(why)
        loop = asyncio.get_running_loop()
        loop.call_later(TOLD_SECONDS, self._conn.disconnect, asyncssh.DISC_BY_APPLICATION, why)

    def abort(self) -> None:
        """End it at once."""
        self._conn.abort()


class _Door:
    """Stands where asyncssh wants a tunnel to listen through: so TLS needs no pump, and sockets are ours to set up."""

    logger = logging.getLogger("asyncssh")

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context

    async def create_server(self, factory: Callable[[str, int], Any], host: str, port: int) -> asyncio.Server:
        """Listen. Raises OSError."""
        tls: dict[str, Any] = {}
        if self._context is not None:
            tls = {"ssl": self._context, "ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": 2.0}
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: _wired(factory("", 0)), host, port, backlog=1024, **tls)


def _wired(connection: Any) -> Any:
    """A connection whose writers hear of its socket, and which is acknowledged at once until its login is done: clients
    send small packets one after another there, and each would wait for the delayed acknowledgement of the last."""
    received = connection.data_received

    def data_received(data: bytes, datatype: Any = None) -> None:
        received(data, datatype)
        owner = connection.get_owner()
        if isinstance(owner, Doorman) and not owner.is_in:
            sock = connection.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def pause_writing() -> None:
        owner = connection.get_owner()
        if isinstance(owner, Doorman):
            owner.room.clear()

    def resume_writing() -> None:
        owner = connection.get_owner()
        if isinstance(owner, Doorman):
            owner.room.set()

    connection.data_received = data_received
    connection.pause_writing = pause_writing
    connection.resume_writing = resume_writing
    return connection


class Service:
    """Both listeners and everybody who came through them."""

    def __init__(self) -> None:
        self.stopping = False
        self._all: dict[Doorman, None] = {}  # the oldest first
        self._of_devbox: Counter[str] = Counter()
        self._listeners: list[Any] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises OSError when an address cannot be had."""
        private, public = await in_database(services.host_key)
        key = asyncssh.import_private_key(private)
        await self._listen(settings.BERTH.ssh_bind, key, None)
        if settings.TLS_CERTIFICATE and settings.TLS_KEY:
            await self._listen(settings.BERTH.ssh_tls_bind, key, _tls())
        else:
            log.warning("no TLS listener: BERTH_TLS_CERTIFICATE and BERTH_TLS_KEY are not set")
        log.info("ready; the host key is %s", public)
        sweeping = asyncio.create_task(self._sweep())
        try:
            await stop.wait()
        finally:
            self.stopping = True
            sweeping.cancel()
            await self._close()

    async def _listen(self, bind: str, key: asyncssh.SSHKey, context: ssl.SSLContext | None) -> None:
        host, _, port = bind.rpartition(":")
        listener = await asyncssh.listen(
            host.strip("[]"),
            int(port),
            tunnel=_Door(context),
            config=None,
            server_factory=lambda: Doorman(self, over_tls=context is not None),
            server_host_keys=[key],
            # OpenSSH's clients use what only OpenSSH understands (that nobody reads their output) by this name alone.
            server_version="OpenSSH_Berth",
            encoding=None,
            line_editor=False,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            agent_forwarding=False,
            x11_forwarding=False,
            sftp_factory=None,
            allow_scp=False,
            rdns_lookup=False,
            encryption_algs=CIPHERS,
            compression_algs=("none",),
            login_timeout=LOGIN_SECONDS,
            keepalive_interval=KEEPALIVE_SECONDS,
            keepalive_count_max=KEEPALIVES_MISSED,
            window=WINDOW,
        )
        self._listeners.append(listener)
        log.info("listening on %s%s", bind, " with TLS" if context else "")

    async def _sweep(self) -> None:
        """Cut who takes nothing, and whose key has ended."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(1)
            for doorman in [doorman for doorman in self._all if doorman.unsent() > UNSENT_MAX]:
                doorman.abort()
            if time.monotonic() - checked < RECHECK_SECONDS:
                continue
            for doorman in [doorman for doorman in self._all if doorman.is_in]:
                try:
                    await doorman.check_again()
                except Exception as error:  # the database is away: it is asked again
                    log.warning("keys could not be looked at again: %s", error)
                    break
            checked = time.monotonic()

    async def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for doorman in list(self._all):
            doorman.disconnect("the server is being restarted; come back")
        deadline = time.monotonic() + STOP_SECONDS
        while self._all and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    # --- called by connections

    def admit(self, doorman: Doorman) -> bool:
        """Whether there is room for one more."""
        if self.stopping or len(self._all) >= CONNECTIONS_MAX:
            return False
        nobodies = [known for known in self._all if not known.is_in]
        if len(nobodies) >= LOGGING_IN_MAX:
            greediest = Counter(known.address for known in nobodies).most_common(1)[0][0]
            oldest = next(known for known in nobodies if known.address == greediest)
            self.leave(oldest)
            oldest.abort()
        self._all[doorman] = None
        return True

    def welcome(self, doorman: Doorman) -> bool:
        """It has logged in: whether its devbox takes one more connection."""
        assert doorman.access is not None
        if self._of_devbox[doorman.access.devbox_id] >= OF_DEVBOX_MAX:
            return False
        doorman.is_in = True
        self._of_devbox[doorman.access.devbox_id] += 1
        return True

    def leave(self, doorman: Doorman) -> None:
        """It has gone."""
        self._all.pop(doorman, None)
        if doorman.is_in and doorman.access is not None:
            doorman.is_in = False
            self._of_devbox[doorman.access.devbox_id] -= 1
            if not self._of_devbox[doorman.access.devbox_id]:
                del self._of_devbox[doorman.access.devbox_id]


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.TLS_CERTIFICATE, settings.TLS_KEY)

    def asked_for(connection: Any, name: str | None, _: ssl.SSLContext) -> None:
        connection.asked_for = name

    context.sni_callback = asked_for
    return context
