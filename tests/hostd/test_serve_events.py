"""Events: to every watcher, until acknowledged, within bounds."""

from __future__ import annotations

import asyncio
import json
import socket

from hostd import events as module
from hostd import messages
from hostd.events import Events, exit_event

BOX = "dbx_01jd4k3v9w8x7y6z5a4b3c2d1e"
OTHER = "dbx_01jd4k3v9w8x7y6z5a4b3c2d1f"


def exe(number: int) -> str:
    return f"exe_{number:026d}"


class Bench:
    """Events with socket pairs for watchers."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[str, list[str]]] = []
        self.room: list[tuple[str | None, bool]] = []
        self.events = Events(
            lambda box, ids: self.acknowledged.append((box, ids)), lambda box, flag: self.room.append((box, flag))
        )

    def watch(self, rest: bytes = b"", small: bool = False) -> Eye:
        ours, theirs = socket.socketpair()
        if small:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        self.events.watch(theirs, rest)
        return Eye(ours)

    def exit(self, number: int, box: str = BOX, size: int = 0) -> None:
        self.events.add(box, exe(number), {"event": "exit", "box": box, "id": exe(number), "stdout": "x" * size})


class Eye:
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.held = b""

    async def lines(self, count: int, seconds: float = 5.0) -> list[str]:
        """Ids of the next events, heartbeats left out."""
        found: list[str] = []

        async def read() -> None:
            while len(found) < count:
                data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 20)
                assert data, "disconnected"
                *lines, self.held = (self.held + data).split(b"\n")
                found.extend(m["id"] for m in map(json.loads, lines) if m["event"] != "heartbeat")

        await asyncio.wait_for(read(), seconds)
        return found

    async def none(self, seconds: float = 0.1) -> bool:
        try:
            await self.lines(1, seconds)
        except TimeoutError:
            return True
        return False

    def ack(self, *numbers: int, box: str = BOX) -> None:
        for line in messages.acks((box, exe(number)) for number in numbers):
            self.socket.send(line)


def test_two_watchers_hear_it_and_one_ack_is_enough():
    async def main() -> None:
        bench = Bench()
        bench.exit(1)
        one, two = bench.watch(), bench.watch()
        bench.exit(2)
        assert await one.lines(2) == [exe(1), exe(2)] == await two.lines(2)
        one.ack(1, 2)
        await asyncio.sleep(0.05)
        assert bench.acknowledged == [(BOX, [exe(1), exe(2)])]
        assert len(bench.events) == 0
        assert await bench.watch().none()

    asyncio.run(main())


def test_unacknowledged_come_again_on_every_connect():
    async def main() -> None:
        bench = Bench()
        bench.exit(1)
        bench.exit(2)
        for _ in range(3):
            eye = bench.watch()
            assert await eye.lines(2) == [exe(1), exe(2)]
            eye.socket.close()
        eye = bench.watch(rest=messages.acks([(BOX, exe(1))])[0])
        assert await eye.lines(1) == [exe(2)]

    asyncio.run(main())


def test_a_repeated_event_is_not_sent_twice():
    async def main() -> None:
        bench = Bench()
        eye = bench.watch()
        bench.exit(1)
        bench.exit(1)
        assert await eye.lines(1) == [exe(1)]
        assert await eye.none()

    asyncio.run(main())


def test_a_destroyed_box_is_forgotten():
    async def main() -> None:
        bench = Bench()
        bench.exit(1)
        bench.exit(2, box=OTHER)
        bench.events.drop_box(BOX)
        assert await bench.watch().lines(1) == [exe(2)]

    asyncio.run(main())


def test_heartbeats(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)

    async def main() -> None:
        bench = Bench()
        eye = bench.watch()
        await asyncio.sleep(0.3)
        beats = [json.loads(line) for line in eye.socket.recv(65536).splitlines()]
        assert 3 <= len(beats) <= 8 and all(beat["event"] == "heartbeat" for beat in beats)
        assert beats == sorted(beats, key=lambda beat: beat["monotonic"])

    asyncio.run(main())


def test_a_slow_watcher_holds_no_copy_and_gets_everything():
    async def main() -> None:
        bench = Bench()
        eye = bench.watch(small=True)
        for number in range(300):
            bench.exit(number, size=2000)
        (watcher,) = bench.events._watchers
        assert len(watcher._out) < 2 * module._CHUNK
        assert await eye.lines(300) == [exe(number) for number in range(300)]

    asyncio.run(main())


def test_a_stuck_watcher_is_disconnected(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.1)

    async def main() -> None:
        bench = Bench()
        bench.watch(small=True)
        for number in range(300):
            bench.exit(number, size=2000)
        await asyncio.sleep(0.5)
        assert not bench.events._watchers
        assert len(bench.events) == 300

    asyncio.run(main())


def test_keepers_wait_when_nobody_acknowledges(monkeypatch):
    monkeypatch.setattr(module, "BOX_BYTES_MAX", 10_000)
    monkeypatch.setattr(module, "HELD_BYTES_MAX", 20_000)

    async def main() -> None:
        bench = Bench()
        for number in range(6):
            bench.exit(number, size=2000)
        assert bench.room == [(BOX, False)]
        for number in range(6):
            bench.exit(number, size=2000, box=OTHER)
        assert bench.room[1:] == [(None, False), (OTHER, False)] or bench.room[1:] == [(OTHER, False), (None, False)]
        bench.room.clear()
        bench.events.drop_box(BOX)
        bench.events.drop(OTHER, [exe(0), exe(1), exe(2)])
        assert (None, True) in bench.room
        assert bench.room[-1] == (OTHER, False)
        bench.events.drop_box(OTHER)
        assert bench.room[-1] == (OTHER, True)
        assert bench.events._bytes == 0 and not bench.events._box_bytes

    asyncio.run(main())


def test_nonsense_disconnects():
    async def main() -> None:
        for nonsense in (b"what\n", b'{"ack":[["x","y"]]}\n', b"x" * (messages.LINE_MAX + 1)):
            bench = Bench()
            eye = bench.watch()
            eye.socket.setblocking(True)
            eye.socket.sendall(nonsense)
            await asyncio.sleep(0.05)
            assert not bench.events._watchers

    asyncio.run(main())


def test_what_a_keeper_tells_of_a_shell_is_passed_on_within_bounds():
    told = {"id": exe(1), "exit": 3, "started_at_ms": 1, "exited_at_ms": 2, "sizes": [0, 0], "dropped": [0, 0]}
    assert exit_event(told | {"notes": ["x" * 2000]})["notes"] == ["x" * 1000]
    for nonsense in ("text", [1], ["x"] * 9, None):
        assert "notes" not in exit_event(told | {"notes": nonsense})
