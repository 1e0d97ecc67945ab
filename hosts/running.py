"""A program run in a box for a client that stays connected, over the loop's connections to its host.

In charge of packets and credit as `hostd.relay` speaks them. Who may run what, and what is spoken with people's SSH
clients, are others'.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Self

from hostd import messages
from hosts import ssh
from hosts.files import Exchange

WINDOW: Final = 512 * 1024
"""Output that a box may send before it is read here; also what an unread program costs in memory."""
PIECE_BYTES: Final = 64 * 1024
READ_BYTES: Final = 256 * 1024
CONTROL_SECONDS: Final = 30.0
INPUT, CONTROL = 0, 1
STDOUT, STDERR, CREDIT, END = 1, 2, 3, 4
_HEAD: Final = struct.Struct("!IB")
_PACKET_MAX: Final = 1 << 20


class Running(Exchange):
    """`start` it, `async for` (STDOUT | STDERR, bytes), then `exit` or `signal` says how it ended. One reader, one
    writer of input; control may come from anywhere."""

    exit: int | None = None
    """0..255 when it ended by itself."""
    signal: int | None = None
    """The number of the signal that ended it, else."""
    core_dumped = False
    _over = False

    async def start(self, body: bytes) -> None:
        """Raises HostRefused (busy, not_ready, bad_request, box_io, unknown_box), HostUnreachable. `aclose` it then."""
        reply = await self._begin(body, window=WINDOW)
        self._credit = reply.get("window", 0)
        if not isinstance(self._credit, int) or not 0 < self._credit <= 1 << 24:
            await self.aclose()
            raise self._unreachable(messages.ProtocolError("its window is senseless"))
        self._more = asyncio.Event()
        self._sending = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        """The output as it comes, to its end. Raises HostUnreachable when it was cut."""
        assert self._stream is not None
        held = self._inbox.rest()
        try:
            while True:
                at = 0
                while len(held) - at >= _HEAD.size:
                    length, kind = _HEAD.unpack_from(held, at)
                    if not 1 <= length <= _PACKET_MAX:
                        raise messages.ProtocolError(f"a packet of {length} bytes")
                    if len(held) - at < length + 4:
                        break
                    data = held[at + _HEAD.size : at + 4 + length]
                    at += 4 + length
                    if kind in (STDOUT, STDERR):
                        yield kind, data
                    elif kind == END:
                        self._ended(messages.parse_object(data))
                        return
                    else:
                        self._granted(kind, data)
                data = await self._stream.read(READ_BYTES)
                if not data:
                    raise ssh.ConnectionCut("the program was cut off")
                held = held[at:] + data
        except (ssh.SshError, messages.ProtocolError) as error:
            raise self._unreachable(error) from error
        finally:
            self._over = True
            self._more.set()

    def _granted(self, kind: int, data: bytes) -> None:
        if kind != CREDIT or len(data) != 4:
            raise messages.ProtocolError(f"a packet of kind {kind}")
        self._credit = min(self._credit + int(struct.unpack("!I", data)[0]), 1 << 24)
        self._more.set()

    def _ended(self, end: dict[str, Any]) -> None:
        code, number = end.get("exit"), end.get("signal")
        if type(code) is int and 0 <= code <= 255:
            self.exit = code
        elif type(number) is int and 1 <= number <= 64:
            self.signal, self.core_dumped = number, end.get("core") is True
        else:
            raise messages.ProtocolError(f"an end that is none: {end}")

    async def write(self, data: bytes) -> None:
        """Input. Waits while the program does not read; dropped once the output has ended. Raises HostUnreachable."""
        at = 0
        while at < len(data) and not self._over:
            size = min(len(data) - at, PIECE_BYTES, self._credit)
            if size <= 0:
                self._more.clear()
                await self._more.wait()
                continue
            self._credit -= size
            await self._packet(INPUT, data[at : at + size])
            at += size

    async def end_input(self) -> None:
        """There is no more."""
        await self._control({"eof": True})

    async def stop_output(self) -> None:
        """Nobody listens to its stdout any more: who writes to it gets SIGPIPE."""
        await self._control({"deaf": True})

    async def resize(self, cols: int, rows: int) -> None:
        """Its terminal has another size."""
        await self._control({"resize": [cols, rows]})

    async def send_signal(self, number: int) -> None:
        """To the foreground of its terminal, or its group."""
        await self._control({"signal": number})

    async def _control(self, asked: dict[str, Any]) -> None:
        await self._packet(CONTROL, messages.encode(asked).strip())

    async def _packet(self, kind: int, data: bytes) -> None:
        assert self._stream is not None
        try:
            async with self._sending, asyncio.timeout(CONTROL_SECONDS):
                await self._stream.write(_HEAD.pack(len(data) + 1, kind) + data)
        except (ssh.SshError, TimeoutError) as error:
            if not self._over:
                raise self._unreachable(error) from error
