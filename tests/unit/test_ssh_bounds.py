"""What clients of the SSH service hold: nothing once they have gone, and never so much that others are kept out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest

from accounts import caps
from api.callers import Caller
from ssh_access import forwards, sessions
from ssh_access.server import LOGGING_IN_MAX, Doorman, Service
from ssh_access.services import Access
from ssh_access.sessions import BoxSession

ACCESS = Access("ssk_1", "dbx_1", Caller(account_id="acc_ssh"), "user")


class Connection:
    """What a doorman sees of one."""

    def __init__(self, address: str) -> None:
        self.address, self.aborted = address, False

    def get_extra_info(self, name: str) -> Any:
        return (self.address, 1)

    def abort(self) -> None:
        self.aborted = True


def _came(service: Service, address: str) -> tuple[Doorman, Connection]:
    doorman, connection = Doorman(service, over_tls=False), Connection(address)
    doorman.connection_made(connection)
    return doorman, connection


def test_who_only_connects_keeps_nobody_out() -> None:
    service = Service()
    honest = _came(service, "10.0.0.1")[1]
    greedy = [_came(service, "10.0.0.2")[1] for _ in range(2 * LOGGING_IN_MAX)]
    late = _came(service, "10.0.0.3")[1]
    assert not honest.aborted and not late.aborted
    assert [connection.aborted for connection in greedy].count(False) == LOGGING_IN_MAX - 2
    assert len(service._all) == LOGGING_IN_MAX


def test_a_dial_whose_client_left_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        dialling, answered, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Slow:
            async def connect(self) -> None:
                dialling.set()
                await answered.wait()

            async def aclose(self) -> None:
                closed.set()

        async def in_database(function: Any, *_: Any) -> Any:
            return SimpleNamespace(devbox_id="dbx_1", host_id="hst_1", open_streams=5)

        monkeypatch.setattr(forwards, "in_database", in_database)
        monkeypatch.setattr(forwards, "async_client_for", lambda _: SimpleNamespace(dial=lambda **_: Slow()))
        doorman = _came(Service(), "10.0.0.1")[0]
        doorman.access = ACCESS
        opening = asyncio.ensure_future(doorman.connection_requested("localhost", 80, "", 0))
        await dialling.wait()
        assert caps._open["acc_ssh"] == 1
        doorman.connection_lost(None)
        answered.set()
        with pytest.raises(asyncssh.ChannelOpenError):
            await opening
        assert closed.is_set() and "acc_ssh" not in caps._open

    asyncio.run(main())


def test_sizes_and_signals_that_nobody_takes_do_not_pile_up() -> None:
    async def main() -> None:
        sizes: list[tuple[int, int]] = []
        taken = asyncio.Event()

        class Stuck:
            async def resize(self, cols: int, rows: int) -> None:
                await taken.wait()
                sizes.append((cols, rows))

            async def send_signal(self, number: int) -> None:
                await taken.wait()

        session: Any = BoxSession(ACCESS, asyncio.Event(), "")
        session.pty_requested("xterm", (80, 24, 0, 0), {})
        session._running = Stuck()
        for number in range(1000):
            session.terminal_size_changed(number + 1, 24, 0, 0)
            session.signal_received("USR1")
            await asyncio.sleep(0)
        assert len(session._tasks) <= sessions.ASKED_MAX
        taken.set()
        while session._tasks:
            await asyncio.sleep(0)
        assert sizes[-1] == (1000, 24) and len(sizes) <= 2

    asyncio.run(main())


def test_what_is_no_text_is_not_set() -> None:
    environment = sessions._Environment()
    for name, value in ((b"LC_A", b"\xff"), (b"LC_\xff", b"a"), (b"LC_B", b"a\0"), (b"LC_C", b"a\nb"), (b"LC_D", b"d")):
        environment[name] = value
    assert environment == {b"LC_D": b"d"}
