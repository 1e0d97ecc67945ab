"""The Transport for threads: dialling, channels to the host's Unix socket, blocking streams with deadlines.

In charge of everything both kinds of Transport share too: socket options, ciphers, opening a stream-local channel,
the re-key cure. See `hosts.ssh` for what is cured and why.
"""

from __future__ import annotations

import collections
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import paramiko
from paramiko.channel import Channel
from paramiko.common import cMSG_CHANNEL_CLOSE, cMSG_CHANNEL_OPEN, cMSG_GLOBAL_REQUEST
from paramiko.message import Message
from paramiko.ssh_exception import AuthenticationException, ChannelException, SSHException

from hosts.ssh.errors import ConnectionCut, DialFailed, HostKeyChanged, LoginRefused, SocketRefused, TimedOut, said
from hosts.ssh.keys import Login, load_key, pinned

KIND: Final = "direct-streamlocal@openssh.com"
WINDOW: Final = 2 * 1024 * 1024
"""Bytes the host may send on a channel before they are read here; also what an unread stream costs in memory."""
IDLE_WINDOW: Final = 256 * 1024
"""For streams that mostly wait."""
PACKET: Final = 32 * 1024
DIAL_SECONDS: Final = 5.0
DEAD_AFTER_MS: Final = 5000
"""Unacknowledged bytes for this long end the connection (TCP_USER_TIMEOUT): a black hole must not hold a thread."""
RECV: Final = 1 << 18

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its tracebacks say what our errors say in one line


class BufferedSocket:
    """What a Transport needs of a socket, with reads served from one large recv: four system calls a packet less."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.buffer = b""
        self.position = 0
        self.heard_at = time.monotonic()
        self.send = raw.send
        self.settimeout = raw.settimeout
        self.getpeername = raw.getpeername
        self.fileno = raw.fileno

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end."""
        if self.position >= len(self.buffer):
            self.buffer, self.position = self.raw.recv(RECV), 0
            self.heard()
        out = self.buffer[self.position : self.position + size]
        self.position += len(out)
        if self.position >= len(self.buffer):
            self.buffer, self.position = b"", 0
        return out

    def heard(self) -> None:
        """Something came: remember when, and acknowledge at once what comes next (the option does not stick)."""
        self.heard_at = time.monotonic()
        try:
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError:
            pass  # closed meanwhile; the next read says so

    def close(self) -> None:
        """Close, waking a thread that is blocked in recv."""
        try:
            self.raw.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.raw.close()

    @property
    def _closed(self) -> bool:  # paramiko asks by this name
        return self.raw.fileno() < 0


def connect(address: str, port: int, timeout: float) -> BufferedSocket:
    """A TCP connection with the options every Transport wants. Raises DialFailed."""
    try:
        raw = socket.create_connection((address, port), timeout)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_MS)
    except OSError as error:
        raise DialFailed(f"{address} port {port}: {said(error)}") from error
    return BufferedSocket(raw)


class _Seen:
    """Stands for `Transport.channels_seen`, a dict that grows by one entry per channel for ever."""

    top = -1

    def __setitem__(self, number: int, _: object) -> None:
        self.top = max(self.top, number)

    def __contains__(self, number: int) -> bool:
        return number <= self.top


def _by_name(name: str) -> Callable[[Any, Any], Any]:
    return lambda channel, message: getattr(channel, name)(message)


class StreamChannel(Channel):
    """A stream-local channel read by threads."""

    refusal: ChannelException | None = None

    def opened(self, refusal: ChannelException | None) -> None:
        """The host's answer to our open, in the reader's thread."""
        self.refusal = refusal


Base: Any = paramiko.Transport  # what is overridden below is outside of its typed surface


class HostTransport(Base):  # type: ignore[misc]
    """A connection whose reader is paramiko's thread. Thread-safe."""

    active: bool
    saved_exception: BaseException | None
    _expected_packet: tuple[int, ...]

    _preferred_ciphers = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # the default ctr costs 1.7 times the CPU
    _preferred_macs = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-256")
    _preferred_compression = ("none",)
    _channel_handler_table = {kind: _by_name(f.__name__) for kind, f in Base._channel_handler_table.items()}

    def __init__(self, connection: BufferedSocket, **more: Any) -> None:
        super().__init__(connection, default_window_size=WINDOW, default_max_packet_size=PACKET, **more)
        self.connection = connection
        self.channels_seen = _Seen()
        self.rekeys = 0
        self._late: collections.deque[Message] = collections.deque()

    @property
    def heard_at(self) -> float:
        """When anything last came from the host, on the monotonic clock."""
        return self.connection.heard_at

    @property
    def channels(self) -> int:
        """How many channels are open."""
        return len(self._channels)

    def probe(self) -> None:
        """Ask the server for a sign of life, which shows in `heard_at`. Does not wait for it."""
        message = Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._send_user_message(message)

    def open_stream(self, path: str, deadline: float, window: int = WINDOW) -> ThreadStream:
        """A channel to the host's Unix socket. Raises SocketRefused, TimedOut or ConnectionCut."""
        channel, message = self._start_open(path, StreamChannel, window)
        event = self.channel_events[channel.chanid] = threading.Event()
        try:
            self._send_user_message(message)
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionCut(f"the connection broke: {said(error)}") from error
        answered = event.wait(max(0.0, deadline - time.monotonic()))
        if channel.refusal is not None:
            raise SocketRefused(f"{path}: {channel.refusal.text}") from channel.refusal
        if not self.active:
            raise ConnectionCut(f"the connection broke: {said(self.saved_exception or EOFError('closed'))}")
        if not answered:
            self.channel_events.pop(channel.chanid, None)
            channel.closed = True  # a late success is answered with CLOSE
            if channel.active:  # the success came between the wait and this line
                channel.closed = False
                channel.close()
            raise TimedOut("the host did not open the channel in time")
        return ThreadStream(self, channel)

    def _start_open(self, path: str, kind: type[Any], window: int) -> tuple[Any, Message]:
        if not self.active:
            raise ConnectionCut("the connection is closed")
        with self.lock:
            number = self._next_channel()
            channel = kind(number)
            self._channels.put(number, channel)
            self.channels_seen[number] = True
            channel._set_transport(self)
            channel._set_window(window, PACKET)
        message = Message()
        message.add_byte(cMSG_CHANNEL_OPEN)
        message.add_string(KIND)
        message.add_int(number)
        message.add_int(window)
        message.add_int(PACKET)
        message.add_string(path)  # OpenSSH's PROTOCOL, 2.4: socket path, reserved, reserved
        message.add_string("")
        message.add_int(0)
        return channel, message

    def _parse_channel_open_success(self, message: Message) -> None:
        number, remote = message.get_int(), message.get_int()
        channel = self._channels.get(number)
        if channel is None or channel.closed:  # whoever opened it gave up; stock paramiko leaks it on the host
            self._channels.delete(number)
            close = Message()
            close.add_byte(cMSG_CHANNEL_CLOSE)
            close.add_int(remote)
            self._send_user_message(close)
            return
        if isinstance(channel, StreamChannel):
            channel.opened(None)
        super()._parse_channel_open_success(Message(message.asbytes()))

    def _parse_channel_open_failure(self, message: Message) -> None:
        number, reason, text = message.get_int(), message.get_int(), message.get_text()
        channel = self._channels.get(number)
        if isinstance(channel, StreamChannel):  # to its opener alone, not to whoever asks the Transport next
            channel.opened(ChannelException(reason, text or "refused"))
            with self.lock:
                self._channels.delete(number)
                event = self.channel_events.pop(number, None)
            if event is not None:
                event.set()
            return
        super()._parse_channel_open_failure(Message(message.asbytes()))

    def _send_user_message(self, message: Message) -> None:
        if (
            threading.current_thread() is self
            and self.initial_kex_done
            and self.active
            and not self.clear_to_send.is_set()
        ):
            self._late.append(message)  # stock: waits for a re-key that only this thread can finish
            return
        super()._send_user_message(message)

    def _parse_newkeys(self, message: Message) -> None:
        super()._parse_newkeys(message)
        self.rekeys += 1
        while self._late and self.clear_to_send.is_set():
            self._send_message(self._late.popleft())


class ThreadStream:
    """A channel to hostd, used by one thread at a time. Deadlines are on the monotonic clock."""

    def __init__(self, transport: HostTransport, channel: Channel) -> None:
        self.transport = transport
        self.channel = channel

    @property
    def is_open(self) -> bool:
        """Whether nothing has been heard of its end."""
        return self.transport.active and not self.channel.closed and not self.channel.eof_received

    def send(self, data: bytes, deadline: float) -> None:
        """Send all of it. Raises TimedOut or ConnectionCut."""
        at = 0
        while at < len(data):
            self._until(deadline)
            try:
                sent = self.channel.send(data[at : at + PACKET])
            except TimeoutError:
                raise TimedOut("the host did not take the request in time") from None
            except (OSError, EOFError, SSHException) as error:
                raise ConnectionCut(f"the channel broke while sending: {said(error)}") from error
            if sent == 0:
                raise ConnectionCut("the host closed the channel while we were sending")
            at += sent

    def recv(self, deadline: float, size: int = 1 << 16) -> bytes:
        """Some bytes, b"" at the end of the stream. Raises TimedOut or ConnectionCut."""
        self._until(deadline)
        try:
            data = self.channel.recv(size)
        except TimeoutError:
            raise TimedOut("the host did not answer in time") from None
        except (OSError, EOFError, SSHException) as error:
            raise ConnectionCut(f"the channel broke: {said(error)}") from error
        if not data and not self.channel.eof_received:
            raise ConnectionCut("the connection was cut")
        return data

    def close(self) -> None:
        """Give the channel up; the host sees it closed."""
        try:
            self.channel.close()
        except (OSError, EOFError, SSHException):
            pass  # it is gone already

    def _until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("the deadline passed")
        self.channel.settimeout(left)


_T = TypeVar("_T", bound=HostTransport)


def log_in(kind: type[_T], login: Login, timeout: float) -> _T:
    """A Transport of that kind, the host's key compared and the user logged in.

    Raises DialFailed, HostKeyChanged, LoginRefused; ValueError for a key of ours that is none.
    """
    key, expected = load_key(login.private_key), pinned(login.host_key)
    where = f"{login.address} port {login.port}"
    deadline = time.monotonic() + timeout
    transport = kind(connect(login.address, login.port, timeout))
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left
    # The type alone decides which of its keys the server shows, so a second key of another type is never compared.
    rsa = expected.get_name() == "ssh-rsa"
    transport._preferred_keys = ("rsa-sha2-512", "rsa-sha2-256") if rsa else (expected.get_name(),)
    try:
        transport.start_client(timeout=left)
        shown = transport.get_remote_server_key()
        if shown.asbytes() != expected.asbytes():
            raise HostKeyChanged(f"{where} shows another host key than the pinned one")
        transport.auth_publickey(login.user, key)
    except AuthenticationException as error:
        _give_up(transport)
        raise LoginRefused(f"{where} refuses our key for {login.user}") from error
    except HostKeyChanged:
        _give_up(transport)
        raise
    except (SSHException, EOFError, OSError) as error:
        _give_up(transport)
        if "no acceptable host key" in str(error).lower():
            raise HostKeyChanged(f"{where} has no host key of the pinned type any more") from error
        raise DialFailed(f"{where}: {said(error)}") from error
    return transport


def _give_up(transport: HostTransport) -> None:
    transport.close()
    transport.packetizer.complete_handshake()  # or its timer thread holds up the process's end


def dial(login: Login, timeout: float = DIAL_SECONDS) -> HostTransport:
    """A logged-in Transport for threads. Raises as `log_in`."""
    return log_in(HostTransport, login, timeout)


def scan_host_key(address: str, port: int, timeout: float = DIAL_SECONDS) -> str:
    """The key the host shows now, as "type base64", without logging in. Raises DialFailed."""
    transport = HostTransport(connect(address, port, timeout))
    transport.banner_timeout = transport.handshake_timeout = timeout
    try:
        transport.start_client(timeout=timeout)
        key = transport.get_remote_server_key()
        return f"{key.get_name()} {key.get_base64()}"
    except (SSHException, EOFError, OSError) as error:
        raise DialFailed(f"{address} port {port}: no SSH server answered: {said(error)}") from error
    finally:
        _give_up(transport)
