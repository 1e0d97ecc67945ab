"""Stands in for connections into boxes: dials this machine's own loopback, as `hosts.dialling.Dialled` is used."""

from __future__ import annotations

import asyncio
from typing import Any

from hosts.client import HostRefused, HostUnreachable


class LocalDials:
    """The one verb of a host's client that tunnels use."""

    def __init__(self, host_id: str) -> None:
        self.host_id = host_id

    def dial(self, *, box: str, port: int) -> LocalDialled:
        return LocalDialled(self.host_id, port)


class LocalDialled:
    """A connection to a port of 127.0.0.1."""

    reason: str | None = None

    def __init__(self, host_id: str, port: int) -> None:
        self._host_id, self._port = host_id, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        try:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 18)
        except OSError:
            raise HostRefused("refused", f"nothing listens on port {self._port}") from None

    async def read(self, size: int = 1 << 18) -> bytes:
        assert self._reader is not None
        if self.reason is not None:
            return b""
        try:
            data = await self._reader.read(size)
        except OSError:
            self.reason = "reset"
            return b""
        if not data:
            self.reason = "end"
        return data

    async def write(self, data: bytes) -> None:
        assert self._writer is not None
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise HostUnreachable(self._host_id, str(error)) from error

    def end(self) -> None:
        assert self._writer is not None
        if self._writer.can_write_eof():
            self._writer.write_eof()

    @property
    def is_fresh(self) -> bool:
        reader: Any = self._reader
        return self.reason is None and not reader.at_eof() and not reader._buffer and not reader._eof

    async def aclose(self) -> None:
        if self._writer is not None:
            self._writer.close()
