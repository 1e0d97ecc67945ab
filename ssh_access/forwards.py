"""A forwarded connection (`ssh -L`, `-W`, `-D`): from the client to a TCP port of the devbox's own loopback.

In charge of which places may be reached that way: the devbox itself, under its loopback's names, and nothing else.
"""

from __future__ import annotations

import time
from typing import Any, Final

import asyncssh

from accounts.caps import limits
from api.errors import ApiError
from api.threads import in_database
from devboxes.services import touch, use_running
from hosts.client import HostRefused, HostUnreachable, async_client_for
from hosts.dialling import Dialled
from ssh_access.channels import Channelled
from ssh_access.services import Access

HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})
TOUCH_SECONDS: Final = 5.0


class Forward(Channelled, asyncssh.SSHTCPSession[bytes]):
    """One forwarded connection. `dial` it before the client is told yes."""

    def __init__(self, access: Access, room: Any) -> None:
        super().__init__(room)
        self._access = access
        self._dialled: Dialled
        self._touched = time.monotonic()

    async def dial(self, port: int) -> Forward:
        """Reach the port. Raises ChannelOpenError, which tells the client why not."""
        access = self._access
        try:
            context = await in_database(use_running, access.caller, access.devbox_id, "SSH reaches it", "ssh")
            cap = (await in_database(limits, access.caller.account_id)).open_streams
            self.hold_place(access.caller.account_id, cap)
            self._dialled = async_client_for(context.host_id or "").dial(box=context.devbox_id, port=port)
            await self._dialled.connect()
            if self.is_over:
                await self._dialled.aclose()
                raise HostUnreachable(context.host_id or "", "its client has gone")
        except BaseException as error:
            self.is_over = True
            await self.held.aclose()
            match error:
                case ApiError() | HostRefused():
                    why = error.message
                case HostUnreachable():
                    why = "the devbox's host does not answer"
                case _:
                    raise
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, why) from error
        self.held.push_async_callback(self._dialled.aclose)
        return self

    def session_started(self) -> None:
        """The client has been told yes."""
        self.begin(self._down())
        self.begin(self._up())

    async def _up(self) -> None:
        try:
            await self.carry_in(self._dialled.write, self._no_more)
        except HostUnreachable:
            self._give_up()

    async def _no_more(self) -> None:
        self._dialled.end()

    async def _down(self) -> None:
        try:
            while data := await self._dialled.read():
                await self.carry_out(data)
                await self._note()
        except HostUnreachable:
            self._give_up()
            return
        if self._dialled.reason == "end" and self._chan is not None:
            self._chan.write_eof()
        else:
            self._give_up()
            return
        if self._ended and not self._queue and self._chan is not None:
            self._chan.close()

    async def _note(self) -> None:
        now = time.monotonic()
        if now - self._touched > TOUCH_SECONDS:
            self._touched = now
            await in_database(touch, self._access.devbox_id, "ssh")

    def refuse(self, why: str, code: int = 255) -> None:
        """End it; there is nobody to tell."""
        self._give_up()

    def _give_up(self) -> None:
        if self._chan is not None:
            self._chan.abort()
