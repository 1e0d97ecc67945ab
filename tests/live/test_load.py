"""Much at once: nothing is lost, nobody is forgotten, and memory stays flat. No times are asserted."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest

from tests.bench.shares import processes, pss_mb, with_descendants
from tests.bench.streaming import NUMBERED_LINES, Lines
from tests.bench.waiting import SOURCES, Polls
from tests.bench.wire import Events, Server, exchange, follow_all
from tests.live.conftest import Berth

pytestmark = pytest.mark.live


@pytest.fixture
def boxes(berth: Berth) -> Iterator[list[str]]:
    """Two running devboxes."""
    made = [berth.owner.create(name=f"load-{number}") for number in range(2)]
    yield made
    for box in made:
        berth.owner.shutdown(box)


def start_all(berth: Berth, boxes: list[str], command: str, count: int) -> list[str]:
    """Start it so many times, spread over the devboxes; the paths of the executions."""
    server = Server(berth.base_url, berth.owner.secret)
    requests = [
        server.request("POST", f"/v1/devboxes/{boxes[number % len(boxes)]}/execute_async", {"command": command})
        for number in range(count)
    ]
    paths = [""] * count
    for number, answer, _, _ in exchange(server, requests, 8, 120):
        assert answer.status == 200, answer
        paths[number] = f"/v1/devboxes/{boxes[number % len(boxes)]}/executions/{answer.json()['execution_id']}"
    return paths


def test_two_hundred_streams_each_get_every_line_once(berth: Berth, boxes: list[str]) -> None:
    server = Server(berth.base_url, berth.owner.secret)
    paths = start_all(berth, boxes, NUMBERED_LINES.format(wait=2, count=12, pause=0.5), 200)
    checks = [Lines(12) for _ in paths]
    streams = [Events(server, f"{path}/stream_stdout_updates") for path in paths]
    try:
        follow_all(streams, 120, lambda number, event: checks[number].take(event))
    finally:
        for stream in streams:
            stream.close()
    for check in checks:
        check.finish()


def test_a_reader_that_stops_holds_up_nothing_and_fills_no_memory(berth: Berth, boxes: list[str]) -> None:
    box, size = boxes[0], 60 << 20  # all of it is kept: see the cap in conftest.py
    server = Server(berth.base_url, berth.owner.secret)
    assert berth.owner.run(box, f"base64 -w 63 /dev/urandom | head -c {size // 10} >block")[2] == 0
    write = "for i in 0 1 2 3 4 5 6 7 8 9; do cat block; done"
    wanted = berth.owner.run(box, f"({write}) | sha256sum")[0].split()[0]

    def memory() -> dict[str, float]:
        now = processes()
        return {name: pss_mb(with_descendants([berth.pids()[name]], now)) for name in ("web", "sshd")}

    # Its end is waited for by this client alone: where the output is stored meanwhile, reading it is another path.
    path = start_all(berth, [box], f"{write}; read -t 3 <> <(:); true", 1)[0]
    stream = Events(server, f"{path}/stream_stdout_updates")
    try:
        digest, read = hashlib.sha256(), 0
        before = memory()
        while read < 1 << 20:
            for event in stream.read():
                assert not event.name, event
                digest.update(event.data["output"].encode())
                read = event.data["offset"]
            time.sleep(0.001)
        # Nobody reads, and the command gets to its end all the same.
        while (view := berth.owner.client.post(f"{path}/wait_for_status", json={"statuses": ["completed"]})).is_error:
            assert view.status_code == 408, view.text
        assert view.json()["exit_status"] == 0
        grown = {name: now - before[name] for name, now in memory().items()}
        assert max(grown.values()) < 32, grown  # MiB, with up to 59 unread
        while not stream.ended:
            for event in stream.read():
                assert not event.name, event
                digest.update(event.data["output"].encode())
                read = event.data["offset"]
            time.sleep(0)
    finally:
        stream.close()
    assert (read, digest.hexdigest()) == (size, wanted)


def test_a_thousand_waiters_all_hear_of_the_end(berth: Berth, boxes: list[str]) -> None:
    paths = start_all(berth, boxes, "sleep 600", 10)
    given = {
        "base_url": berth.base_url,
        "key": berth.owner.secret,
        "sources": SOURCES,
        "paths": [paths[number % len(paths)] for number in range(1000)],
    }
    with Polls(given) as polls:
        polls.told("asked", 120)
        ended = berth.owner.post(f"{paths[0]}/kill")
        assert ended["exit_status"] == 137
        for path in paths[1:]:
            berth.owner.client.post(f"{path}/kill", json={})
        told = polls.told("answered", 120)
    assert (told["left"], told["wrong"], len(told["answered"])) == (0, [], 1000)
