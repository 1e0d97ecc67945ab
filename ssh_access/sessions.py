"""A session of a client: a command, a shell or sftp, run in the devbox as its user.

In charge of what is started for which request, of the terminal, signals and the exact end. The protocol is asyncssh's,
the program is the host's (`hosts.running`).
"""

from __future__ import annotations

import contextlib
import logging
import signal as signals
import time
from typing import Any, Final

import asyncssh
import orjson

from accounts.caps import limits
from api.errors import ApiError
from api.threads import in_database
from devboxes import selectors as devboxes
from devboxes.selectors import ExecutionContext
from devboxes.services import touch, use_running
from hosts.client import HostRefused, HostUnreachable, async_client_for
from hosts.running import STDERR, Running
from ssh_access.channels import Channelled
from ssh_access.services import Access

log = logging.getLogger(__name__)

SHELL: Final = ["/bin/bash", "-l"]
SUBSYSTEMS: Final = {"sftp": ["/usr/lib/openssh/sftp-server"]}
CELLS_MAX: Final = 1000
TOUCH_SECONDS: Final = 5.0
ASKED_MAX: Final = 100
"""Signals on their way to one program; more are dropped."""
ENVIRONMENT_MAX: Final = 64
ENVIRONMENT_BYTES: Final = 4096


class _Environment(dict[bytes, bytes]):
    """What the client wants set: its language and its terminal's colours, within bounds. The rest is the devbox's."""

    def __setitem__(self, name: bytes, value: bytes) -> None:
        wanted = name in (b"LANG", b"COLORTERM") or name.startswith(b"LC_")
        if not wanted or len(self) >= ENVIRONMENT_MAX or len(name) + len(value) > ENVIRONMENT_BYTES:
            return
        with contextlib.suppress(UnicodeDecodeError):
            if (name + value).decode().isprintable():
                super().__setitem__(name, value)


class BoxSession(Channelled, asyncssh.SSHServerSession[bytes]):
    """One session channel."""

    def __init__(self, access: Access, room: Any, peer: str) -> None:
        super().__init__(room)
        self._access, self._peer = access, peer
        self._terminal: tuple[str, int, int] | None = None
        self._what: dict[str, Any] = {}
        self._running: Running | None = None
        self._touched = 0.0
        self._resizing = False

    # --- called by asyncssh

    def connection_made(self, chan: Any) -> None:
        """The channel is open."""
        super().connection_made(chan)
        chan._env = _Environment()
        chan._process_eow_at_openssh_dot_com_request = self._listens_no_more

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Any) -> bool:
        """A terminal is wanted for what comes."""
        self._terminal = (term_type[:64], *_cells(term_size[0], term_size[1]))
        return True

    def shell_requested(self) -> bool:
        """A login shell."""
        return self._start({"argv": SHELL})

    def exec_requested(self, command: str) -> bool:
        """One command, as sshd runs it: by a shell that is no login shell, whose output is the command's alone."""
        return self._start({"command": command, "login": False})

    def subsystem_requested(self, subsystem: str) -> bool:
        """Sftp, served by a program of the box itself: every path is the box's."""
        argv = SUBSYSTEMS.get(subsystem)
        return argv is not None and self._start({"argv": argv})

    def _start(self, what: dict[str, Any]) -> bool:
        self._what = what
        return True

    def session_started(self) -> None:
        """The client has been told yes."""
        self.begin(self._run())

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        """The client's window has another size."""
        if self._terminal is None:
            return
        self._terminal = (self._terminal[0], *_cells(width, height))
        if self._running is not None and not self._resizing:
            self._resizing = True
            self.begin(self._resize(self._running))

    async def _resize(self, running: Running) -> None:
        """To the last size that was told: a client may tell them faster than they are taken."""
        told: Any = None
        while told != self._terminal:
            told = self._terminal
            await self._quietly(running.resize(*told[1:]))
        self._resizing = False

    def signal_received(self, signal: str) -> None:
        """A signal by its name."""
        found = getattr(signals.Signals, f"SIG{signal}", None)
        if found is not None and 1 <= found <= 31 and self._running is not None and self._may_ask():
            self.begin(self._quietly(self._running.send_signal(int(found))))

    def break_received(self, msec: int) -> bool:
        """A break is an interrupt."""
        self.signal_received("INT")
        return True

    def _listens_no_more(self, packet: Any) -> bool:
        """OpenSSH says so when whatever reads its own output has gone: `ssh … yes | head`."""
        if self._running is not None and self._may_ask():
            self.begin(self._quietly(self._running.stop_output()))
        return True

    def _may_ask(self) -> bool:
        """Does the program's host take what it was asked before?"""
        return len(self._tasks) < ASKED_MAX

    async def _quietly(self, asking: Any) -> None:
        with contextlib.suppress(HostUnreachable):  # the output says so
            await asking

    # --- the program

    async def _run(self) -> None:
        try:
            running = await self._started()
        except ApiError as error:
            self.refuse(error.message)
            return
        except HostUnreachable as error:
            log.info("a session of %s could not begin: %s", self._access.devbox_id, error)
            self.refuse("the devbox's host does not answer; try again shortly")
            return
        except HostRefused as error:
            log.info("a session of %s was refused: %s", self._access.devbox_id, error)
            self.refuse(f"this cannot be started at the moment: {error.message}")
            return
        except Exception:
            log.exception("a session of %s could not begin", self._access.devbox_id)
            self.refuse("this cannot be started because of an error of the server's")
            return
        self._running = running
        if self._terminal is not None:  # it may have changed meanwhile
            self.begin(self._quietly(running.resize(*self._terminal[1:])))
        self.begin(self._carry_input(running))
        try:
            async for kind, data in running:
                await self.carry_out(data, asyncssh.EXTENDED_DATA_STDERR if kind == STDERR else None)
                await self._note()
        except HostUnreachable as error:
            log.info("a session of %s was cut: %s", self._access.devbox_id, error)
            self.refuse("the connection to the devbox was cut")
            return
        self._end(running)

    async def _started(self) -> Running:
        context, cap, environment = await in_database(_what_is_needed, self._access)
        self.hold_place(context.account_id, cap)
        asked = {name.decode(): value.decode() for name, value in self._chan._env.items()} if self._chan else {}
        own = {"SSH_CONNECTION": self._peer, **({"TERM": self._terminal[0]} if self._terminal else {})}
        body = orjson.dumps({**self._what, "user": context.user, "env": {**own, **environment, **asked}})
        size = {} if self._terminal is None else dict(zip(("cols", "rows"), self._terminal[1:], strict=True))
        running = async_client_for(context.host_id or "").running(box=context.devbox_id, body=body, **size)
        self.held.push_async_callback(running.aclose)
        await running.start(body)
        return running

    async def _carry_input(self, running: Running) -> None:
        async def write(data: bytes) -> None:
            await running.write(data)
            await self._note()

        await self._quietly(self.carry_in(write, running.end_input))

    async def _note(self) -> None:
        now = time.monotonic()
        if now - self._touched > TOUCH_SECONDS:
            self._touched = now
            await in_database(touch, self._access.devbox_id, "ssh")

    def _end(self, running: Running) -> None:
        if self._chan is None:
            return
        if running.exit is not None:
            self._chan.exit(running.exit)
            return
        number = running.signal or 0
        known = number in signals.valid_signals() and number < signals.SIGRTMIN
        name = signals.Signals(number).name.removeprefix("SIG") if known else f"{number}@berth"
        self._chan.exit_with_signal(name, running.core_dumped)


def _what_is_needed(access: Access) -> tuple[ExecutionContext, int, dict[str, str]]:
    """The running devbox, how many streams its account may have open, and its environment: one hop to a thread."""
    context = use_running(access.caller, access.devbox_id, "SSH reaches it", "ssh")
    return context, limits(context.account_id).open_streams, devboxes.environment(context.devbox_id)


def _cells(cols: int, rows: int) -> tuple[int, int]:
    return min(cols or 80, CELLS_MAX), min(rows or 24, CELLS_MAX)
