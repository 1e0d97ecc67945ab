"""When output came, which commands have some, and what is written after an exit: what logs are made of."""

from __future__ import annotations

import binascii
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import output_index
from hostd.messages import INDEX_RECORD
from tests.hostd.bare_box import Box, Client, Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(31)


def records(data: bytes) -> list[tuple[int, int, int]]:
    """(stream, time in ms, bytes by then)."""
    return [(stamp % 2 + 1, stamp // 2, end) for stamp, end in INDEX_RECORD.iter_unpack(data)]


def index(box: Box, name: str, late: bool = False) -> list[tuple[int, int, int]]:
    with box.open(verb="index", id=name, late=late) as client:
        answer = client.line()
        assert answer.get("ok"), answer
        return records(client.file.read(answer["body"]))


def read_late(box: Box, name: str, offset: int, limit: int = 1 << 20, stream: str = "late_stdout") -> tuple[int, bytes]:
    with box.open(verb="read", id=name, stream=stream, offset=offset, limit=limit) as client:
        answer = client.line()
        return answer["offset"], client.file.read(answer["body"])


def test_each_piece_of_output_has_its_time(box: Box) -> None:
    began = time.time() * 1000
    box.run("exe_times", "echo one; sleep 0.2; echo two >&2; sleep 0.2; echo three")
    event = box.exit_event("exe_times")
    found = records(binascii.a2b_base64(event["index"]))
    assert [(stream, end) for stream, _, end in found] == [(1, 4), (2, 4), (1, 10)]
    times = [at_ms - began for _, at_ms, _ in found]
    assert times[0] >= 0 and times[1] - times[0] >= 190 and times[2] - times[1] >= 190 and times[2] < 5000
    assert index(box, "exe_times") == found
    assert not os.path.exists(f"{box.out}/exe_times.index"), "a quick command leaves no file"


def test_a_command_without_output_has_no_index(box: Box) -> None:
    box.run("exe_silent", "true")
    assert "index" not in box.exit_event("exe_silent") and index(box, "exe_silent") == []


def test_the_number_of_records_is_bounded_and_every_byte_has_one(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = output_index.Index(os.open(box.out, os.O_RDONLY), "exe_thin.index", 0)
    clock = [1_000_000]
    monkeypatch.setattr(output_index, "now_ms", lambda: clock[0])
    for step in range(1, 20_001):
        clock[0] += 20
        entry.note(1 + step % 2, step)
    found = records(entry.read())
    assert len(found) <= output_index.MAX_RECORDS
    assert [end for stream, _, end in found if stream == 1][-1] == 20_000
    assert [end for stream, _, end in found if stream == 2][-1] == 19_999
    assert found == sorted(found, key=lambda record: record[1])
    kept = entry.for_event()
    assert kept is not None and len(binascii.a2b_base64(kept)) <= output_index.EVENT_RECORDS * 16
    assert entry.seal() == {} and records(entry.read()) == found, "too many for the journal: kept in the file"


def test_times_outlive_the_keeper(box: Box) -> None:
    box.spawn("exe_killed", "echo a; sleep 1.2; echo b; sleep 0.3; echo c; read x; echo d", stdin="pipe")
    while len(index(box, "exe_killed")) < 3:
        time.sleep(0.02)
    before = index(box, "exe_killed")
    box.kill_keeper()
    assert [end for _, _, end in index(box, "exe_killed")] == [2, 4, 6]
    assert index(box, "exe_killed")[0] == before[0]
    assert all(abs(x[1] - y[1]) < 100 for x, y in zip(before, index(box, "exe_killed"), strict=True))
    box.ask(verb="stdin", id="exe_killed", request="r1", eof=True, raw=b"x\n")
    box.wait("exe_killed")
    assert [end for _, _, end in index(box, "exe_killed")] == [2, 4, 6, 8]
    box.kill_keeper()
    assert [end for _, _, end in index(box, "exe_killed")] == [2, 4, 6, 8]


def test_what_comes_after_the_exit_is_kept_and_read(box: Box) -> None:
    box.run("exe_late", "(sleep 0.3; echo after; sleep 0.2; echo more) & echo before")
    assert box.file("exe_late") == b"before\n"
    deadline = time.monotonic() + 5
    while read_late(box, "exe_late", 0)[1] != b"after\nmore\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [(stream, end) for stream, _, end in index(box, "exe_late", late=True)] == [(1, 6), (1, 11)]
    assert read_late(box, "exe_late", 6) == (6, b"more\n") and read_late(box, "exe_late", 11) == (11, b"")
    listed = {entry["id"]: entry for entry in box.ask(verb="sizes")["executions"]}
    assert listed["exe_late"]["late"] == [11, 0] and listed["exe_late"]["sizes"] == [7, 0]
    box.ack("exe_late")
    box.ask(verb="forget", ids=["exe_late"])
    assert read_late(box, "exe_late", 0) == (0, b"after\nmore\n"), "not part of what was stored elsewhere"
    box.kill_keeper()
    assert read_late(box, "exe_late", 0) == (0, b"after\nmore\n")
    assert len(index(box, "exe_late", late=True)) == 2


def test_only_the_last_mebibyte_of_late_output_is_kept_in_order(box: Box) -> None:
    box.run("exe_ring", "(sleep 0.2; seq 1 300000) & true")
    want = "".join(f"{n}\n" for n in range(1, 300_001)).encode()
    deadline = time.monotonic() + 20
    while read_late(box, "exe_ring", 0)[0] != len(want) - (1 << 20):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_late(box, "exe_ring", 0) == (len(want) - (1 << 20), want[-(1 << 20) :])
    assert read_late(box, "exe_ring", len(want) - 100, 60)[1] == want[-100:-40]
    box.kill_keeper()
    assert read_late(box, "exe_ring", len(want) - 10)[1] == want[-10:], "the place in the ring is known again"


def lines(client: Client) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.frame().splitlines()]


def test_changes_are_told_at_once_and_coalesced(box: Box) -> None:
    box.spawn("exe_told", "cat", stdin="pipe")
    with box.open(verb="changes") as client:
        assert client.line()["ok"]
        seen: dict[str, Any] = {}
        while "exe_told" not in seen:
            seen |= {entry["id"]: entry for entry in lines(client)}
        assert seen["exe_told"]["sizes"] == [0, 0] and seen["exe_told"]["state"] == "running"
        for number in range(5):
            at = time.monotonic()
            box.ask(verb="stdin", id="exe_told", request=f"r{number}", raw=b"x" * 10)
            while (entry := lines(client)[-1])["sizes"][0] < 10 * (number + 1):
                pass
            assert time.monotonic() - at < 2
        box.ask(verb="stdin", id="exe_told", request="end", eof=True)
        while (entry := lines(client)[-1])["state"] != "exited":
            pass
        assert entry["id"] == "exe_told" and entry["sizes"] == [50, 0]
        box.run("exe_new", "echo hello")
        while (entry := lines(client)[-1])["id"] != "exe_new" or entry["state"] != "exited":
            pass
        assert entry["sizes"] == [6, 0]


def test_a_listener_that_has_gone_is_forgotten_and_one_that_is_slow_costs_nothing(box: Box) -> None:
    box.spawn("exe_busy", "yes")
    with box.open(verb="changes") as slow:
        slow.line()
        time.sleep(0.5)
        assert box.ask(verb="state", id="exe_busy")["state"] == "running"
        frames = [lines(slow) for _ in range(3)]
        assert all(len(frame) <= 200 for frame in frames)
    box.ask(verb="kill", id="exe_busy", fence=1, signal=9, group=True)
    assert box.wait("exe_busy")["exit"] == 137
