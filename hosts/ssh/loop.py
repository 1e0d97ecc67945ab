"""The Transport for the event loop, which owns the socket: no thread, no hop, backpressure by the channel's window.

In charge of feeding paramiko's packet layer and handler tables from a loop's reader callback (what `Transport.run` does
in its thread), and of streams that are awaited. After `attach` everything runs in that loop; nothing here is
thread-safe.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final

from paramiko.common import (
    MSG_DEBUG,
    MSG_DISCONNECT,
    MSG_IGNORE,
    MSG_KEXINIT,
    MSG_UNIMPLEMENTED,
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_WINDOW_ADJUST,
    cMSG_UNIMPLEMENTED,
)
from paramiko.message import Message
from paramiko.packet import Packetizer
from paramiko.ssh_exception import ChannelException, SSHException

from hosts.ssh.errors import ConnectionCut, DialFailed, SocketRefused, TimedOut, said
from hosts.ssh.keys import Login
from hosts.ssh.threads import DIAL_SECONDS, RECV, WINDOW, BufferedSocket, HostTransport, StreamChannel, log_in

OUT_HIGH: Final = 1 << 20
"""Bytes waiting for the socket above which writers wait."""
SLICE: Final = 1 << 20
"""Bytes taken from the socket before the loop gets a turn for others."""

ADJUSTS: Final = 4
"""How many times per window the host is told that there is room again: each time costs a packet both ways."""


class _Packets(Packetizer):
    """Writes through the loop once it owns the socket."""

    sink: Callable[[bytes], None] | None = None

    def write_all(self, out: Any) -> None:
        if self.sink is None:
            super().write_all(out)
        else:
            self.sink(out)


class LoopTransport(HostTransport):
    """A connection driven by an event loop."""

    def __init__(self, connection: BufferedSocket) -> None:
        super().__init__(connection, packetizer_class=_Packets)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.waiting_bytes = 0
        self._out: collections.deque[bytes] = collections.deque()
        self._writing = False
        self._room: list[asyncio.Future[None]] = []
        self._descriptor = -1

    def run(self) -> None:
        """Paramiko's thread: handshake and authentication only; whatever comes after stays in the buffer."""
        try:
            self.packetizer.write_all((self.local_version + "\r\n").encode())
            self._check_banner()
            self.packetizer.start_handshake(self.handshake_timeout)
            self._send_kex_init()
            self._expect_packet(MSG_KEXINIT)
            while self.active and not self.authenticated:
                if not self._take(*self.packetizer.read_message()):
                    raise EOFError("the server disconnected")
                if self.initial_kex_done:
                    self.packetizer.complete_handshake()
            if self.active:
                return
        except Exception as error:
            self.saved_exception = error
        self.active = False
        self.packetizer.close()
        if self.completion_event is not None:
            self.completion_event.set()
        if self.auth_handler is not None:
            self.auth_handler.abort()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on this loop owns the socket. Call in the loop, once, after the login."""
        self.loop = loop
        raw = self.connection.raw
        raw.setblocking(False)
        self._descriptor = raw.fileno()
        self.packetizer.sink = self._sink
        loop.add_reader(self._descriptor, self._readable)
        self._pump()

    # --- inwards ---

    def _readable(self) -> None:
        connection = self.connection
        taken = 0
        while taken < SLICE and self.active:
            try:
                data = connection.raw.recv(RECV)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lost(error)
                return
            if not data:
                self._lost(EOFError("the host closed the connection"))
                return
            connection.heard()
            left = connection.buffer[connection.position :] if connection.buffer else b""
            connection.buffer, connection.position = left + data if left else data, 0
            self._pump()
            taken += len(data)
            if len(data) < RECV:
                return

    def _pump(self) -> None:
        connection, packets = self.connection, self.packetizer
        try:
            while self.active:
                buffer, at = connection.buffer, connection.position
                # With GCM and encrypt-then-MAC the packet's length travels in clear.
                if len(buffer) - at < 4:
                    return
                whole = 4 + int.from_bytes(buffer[at : at + 4], "big") + packets.get_mac_size_in()
                if whole > RECV:
                    raise SSHException(f"a packet of {whole} bytes is over the limit of {RECV}")
                if len(buffer) - at < whole:
                    return
                if not self._take(*packets.read_message()):
                    raise EOFError("the host disconnected")
                if packets.need_rekey() and not self.in_kex:
                    self._send_kex_init()
        except Exception as error:
            self._lost(error)

    def _take(self, kind: int, message: Message) -> bool:
        """One packet, as the inner part of paramiko's `Transport.run`. False: the server said goodbye."""
        if kind in (MSG_IGNORE, MSG_DEBUG):
            self._enforce_strict_kex(kind)
            return True
        if kind == MSG_DISCONNECT:
            self._parse_disconnect(message)
            return False
        if self._expected_packet:
            if kind not in self._expected_packet:
                raise SSHException(f"expected a packet of {self._expected_packet}, got {kind}")
            self._expected_packet = ()
            if 30 <= kind <= 41:
                self.kex_engine.parse_next(kind, message)
                return True
        if kind in self._handler_table:
            refusal = self._ensure_authed(kind, message)
            if refusal:
                self._send_message(refusal)
            else:
                self._handler_table[kind](message)
        elif kind in self._channel_handler_table:
            number = message.get_int()
            channel = self._channels.get(number)
            if channel is not None:
                self._channel_handler_table[kind](channel, message)
            elif number not in self.channels_seen:
                raise SSHException(f"a message for channel {number}, which never was")
        elif self.auth_handler is not None and kind in self.auth_handler._handler_table:
            self.auth_handler._handler_table[kind](message)
        elif kind != MSG_UNIMPLEMENTED:
            answer = Message()
            answer.add_byte(cMSG_UNIMPLEMENTED)
            answer.add_int(message.seqno)
            self._send_message(answer)
        return True

    # --- outwards ---

    def _sink(self, out: bytes) -> None:
        if not self._writing:
            try:
                sent = self.connection.raw.send(out)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                assert self.loop is not None
                self.loop.call_soon(self._lost, error)  # not from inside of whoever is sending
                return
            if sent == len(out):
                return
            out = out[sent:]
            self._writing = True
            assert self.loop is not None
            self.loop.add_writer(self._descriptor, self._writable)
        self._out.append(out)
        self.waiting_bytes += len(out)

    def _writable(self) -> None:
        try:
            while self._out:
                sent = self.connection.raw.send(self._out[0])
                self.waiting_bytes -= sent
                if sent < len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                    break
                self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._lost(error)
            return
        if not self._out:
            self._writing = False
            assert self.loop is not None
            self.loop.remove_writer(self._descriptor)
        if self._room and self.waiting_bytes < OUT_HIGH // 2:
            self._wake_writers()

    def _wake_writers(self) -> None:
        waiting, self._room = self._room, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def room(self) -> None:
        """Wait until the socket takes more."""
        while self.waiting_bytes > OUT_HIGH and self.active:
            assert self.loop is not None
            future: asyncio.Future[None] = self.loop.create_future()
            self._room.append(future)
            await future

    def _send_user_message(self, message: Message) -> None:
        if self.loop is None:
            super()._send_user_message(message)
            return
        if not self.active:
            return
        if self.clear_to_send.is_set():
            self._send_message(message)
        else:
            self._late.append(message)
        if self.packetizer.need_rekey() and not self.in_kex:
            self._send_kex_init()

    # --- the end ---

    def _lost(self, error: BaseException) -> None:
        if not self.active:
            return
        self.saved_exception = error
        self.active = False
        if self.loop is not None:
            self.loop.remove_reader(self._descriptor)
            if self._writing:
                self.loop.remove_writer(self._descriptor)
                self._writing = False
        for channel in list(self._channels.values()):
            channel._unlink()
        self._wake_writers()
        self._out.clear()
        self.packetizer.close()

    def close(self) -> None:
        """End the connection and every stream on it."""
        if self.loop is None:
            super().close()
        else:
            self._lost(EOFError("closed by us"))

    # --- channels ---

    async def open(self, path: str, timeout: float, window: int = WINDOW) -> LoopStream:
        """A channel to the host's Unix socket. Raises SocketRefused, TimedOut or ConnectionCut."""
        channel, message = self._start_open(path, LoopStream, window)
        assert self.loop is not None
        channel.answer = self.loop.create_future()
        self._send_user_message(message)
        try:
            async with asyncio.timeout(timeout):
                await channel.answer
        except ChannelException as error:
            raise SocketRefused(f"{path}: {error.text}") from error
        except TimeoutError:
            channel.abandon()
            raise TimedOut("the host did not open the channel in time") from None
        except BaseException:
            channel.abandon()
            raise
        return channel  # type: ignore[no-any-return]


class LoopStream(StreamChannel):
    """A channel to hostd, awaited by one reader and one writer. Close it with `aclose`: a lost one costs a window."""

    transport: LoopTransport

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.answer: asyncio.Future[None] | None = None
        self._received: collections.deque[bytes] = collections.deque()
        self._rest = b""
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    def __del__(self) -> None:
        # Only the loop may send, and the collector runs anywhere.
        transport = getattr(self, "transport", None)
        if transport is None or self.closed or not self.active or not transport.active or transport.loop is None:
            return
        close = Message()
        close.add_byte(cMSG_CHANNEL_CLOSE)
        close.add_int(self.remote_chanid)
        try:
            transport.loop.call_soon_threadsafe(transport._send_user_message, close)
        except RuntimeError:
            pass  # the loop is closed, and the connection with it

    # --- called by the Transport ---

    def opened(self, refusal: ChannelException | None) -> None:
        """The host's answer to our open."""
        if self.answer is not None and not self.answer.done():
            if refusal is None:
                self.answer.set_result(None)
            else:
                self.answer.set_exception(refusal)

    def _set_window(self, window_size: int, max_packet_size: int) -> None:
        super()._set_window(window_size, max_packet_size)  # type: ignore[misc]
        self.in_window_threshold = window_size // ADJUSTS

    def _feed(self, message: Message | bytes) -> None:
        self._received.append(message if isinstance(message, bytes) else message.get_binary())
        _wake(self._reader)

    def _handle_eof(self, message: Message) -> None:
        super()._handle_eof(message)  # type: ignore[misc]
        _wake(self._reader)

    def _window_adjust(self, message: Message) -> None:
        super()._window_adjust(message)  # type: ignore[misc]
        _wake(self._writer)

    def _set_closed(self) -> None:
        super()._set_closed()  # type: ignore[misc]
        _wake(self._reader)
        _wake(self._writer)
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionCut("the connection was cut"))

    # --- called by its user ---

    def abandon(self) -> None:
        """Give up an open that may not have been answered yet."""
        if self.active:
            self.aclose()
        else:
            self.closed = True  # a late success is answered with CLOSE

    async def read(self, size: int = 1 << 16) -> bytes:
        """Some bytes, at most `size`; b"" at the end of the stream. Raises ConnectionCut.

        The host's window grows by what is returned here, so a slow reader slows the host.
        """
        received = self._received
        while not received and not self._rest:
            if self.eof_received:
                return b""
            if self.closed:
                raise ConnectionCut("the connection was cut")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._rest:
            out, self._rest = self._rest, b""
        else:
            out = received.popleft()
            if received and len(out) < size:
                parts, total = [out], len(out)
                while received and total + len(received[0]) <= size:
                    total += len(received[0])
                    parts.append(received.popleft())
                out = b"".join(parts)
        if len(out) > size:
            out, self._rest = out[:size], out[size:]
        grown = self._check_add_window(len(out))  # type: ignore[attr-defined]
        if grown:
            adjust = Message()
            adjust.add_byte(cMSG_CHANNEL_WINDOW_ADJUST)
            adjust.add_int(self.remote_chanid)
            adjust.add_int(grown)
            self.transport._send_user_message(adjust)
        return out

    async def write(self, data: bytes) -> None:
        """Hand all of it to the connection. Raises ConnectionCut."""
        view = memoryview(data)
        while view:
            await self.transport.room()
            if self.closed or self.eof_sent:
                raise ConnectionCut("the host closed the channel while we were sending")
            size = min(len(view), self.out_window_size, self.out_max_packet_size - 64)
            if size <= 0:
                self._writer = asyncio.get_running_loop().create_future()
                try:
                    await self._writer
                finally:
                    self._writer = None
                continue
            self.out_window_size -= size
            message = Message()
            message.add_byte(cMSG_CHANNEL_DATA)
            message.add_int(self.remote_chanid)
            message.add_string(bytes(view[:size]))
            self.transport._send_user_message(message)
            view = view[size:]

    def takes(self, size: int) -> bool:
        """Would a write of so many bytes go out without waiting?"""
        return not self.closed and size <= self.out_window_size and self.transport.waiting_bytes <= OUT_HIGH

    @property
    def is_quiet(self) -> bool:
        """Is it open both ways, with nothing received that was not read?"""
        return not (self.closed or self.eof_received or self.eof_sent or self._received or self._rest)

    def end(self) -> None:
        """Send the end of file: nothing more will be written, what comes can still be read. May be called twice."""
        with self.lock:
            message = self._send_eof()  # type: ignore[attr-defined]
        if message is not None and not self.closed:
            self.transport._send_user_message(message)

    def aclose(self) -> None:
        """Give the channel up; what was not read is dropped. May be called twice."""
        with self.lock:
            messages = self._close_internal()  # type: ignore[attr-defined]
        for message in messages:
            if message is not None:
                self.transport._send_user_message(message)
        self._received.clear()
        self._rest = b""


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


async def dial_for_loop(login: Login, executor: Executor, timeout: float = DIAL_SECONDS) -> LoopTransport:
    """A logged-in Transport owned by the running loop. Raises as `threads.log_in`.

    Handshake and login block, so they run in the executor; if we are cancelled meanwhile, the connection is closed.
    """
    loop = asyncio.get_running_loop()

    def work() -> LoopTransport:
        transport = log_in(LoopTransport, login, timeout)
        transport.join(1.0)  # its thread ends with the login; the loop must be alone with the socket
        if transport.is_alive():
            transport.close()
            raise DialFailed("the login's thread did not end within 1 s")
        return transport

    dialling = loop.run_in_executor(executor, work)
    try:
        transport = await asyncio.shield(dialling)
    except asyncio.CancelledError:
        dialling.add_done_callback(_close_result)
        raise
    transport.attach(loop)
    if not transport.active:
        raise DialFailed(f"the connection broke: {said(transport.saved_exception)}")
    return transport


def _close_result(dialling: asyncio.Future[LoopTransport]) -> None:
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result().close()


__all__ = ["LoopStream", "LoopTransport", "dial_for_loop"]
