"""Cutting output into the entries of a log, and the times they get."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from devboxes import log_works
from devboxes.log_lines import LINE_BYTES, STDERR, STDOUT, Times, cut
from devboxes.log_works import Output, Work, newest, onwards
from hostd.messages import INDEX_RECORD
from hosts.client import HostRefused, parse_sizes


def lines(data: bytes, *, whole: bool = True, limit: int = 1000) -> list[str]:
    found = list(cut(data, whole=whole, limit=limit))
    ends = [end for end, _ in found]
    assert ends == sorted(set(ends)) and (not whole or len(found) == limit or (ends or [0])[-1] == len(data))
    return [line for _, line in found]


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\n", ["a", "", "b"]),
        (b"a\rb\n", ["a\rb"]),
        (b"\xff\xfe\n\xc3", ["\ufffd\ufffd", "\ufffd"]),
    ],
)
def test_lines(data: bytes, want: list[str]) -> None:
    assert lines(data) == want


def test_what_has_no_end_yet_waits_unless_it_is_too_long() -> None:
    assert lines(b"a\nb", whole=False) == ["a"]
    assert lines(b"x" * LINE_BYTES, whole=False) == []
    assert lines(b"x" * (LINE_BYTES + 1), whole=False) == ["x" * LINE_BYTES]
    assert lines(b"x" * LINE_BYTES + b"\ny", whole=False) == ["x" * LINE_BYTES], "its end is in reach"


@pytest.mark.parametrize("character", ["é", "你", "🎉"])
@pytest.mark.parametrize("before", range(4))
def test_a_long_line_is_cut_between_characters(character: str, before: int) -> None:
    data = b"a" * before + character.encode() * LINE_BYTES
    found = lines(data)
    assert "".join(found) == data.decode() and "\ufffd" not in "".join(found) and len(found) > 1


def test_a_limit_stops_where_the_next_begins() -> None:
    assert list(cut(b"1\n2\n3\n", whole=True, limit=2)) == [(2, "1"), (4, "2")]


def records(*given: tuple[int, int, int]) -> bytes:
    return b"".join(INDEX_RECORD.pack(at_ms * 2 + stream - 1, end) for at_ms, stream, end in given)


def test_times_are_those_of_the_record_that_reaches_beyond_a_byte() -> None:
    times = Times(records((10, 1, 4), (15, 2, 3), (20, 1, 8)), 5, 18)
    assert [times.at(STDOUT, at) for at in (0, 3, 4, 7, 8, 99)] == [10, 10, 18, 18, 18, 18], "not after its end"
    assert [times.at(STDERR, at) for at in (0, 2, 3)] == [15, 15, 15]
    assert Times(records((1, 1, 4)), 5, None).at(STDOUT, 0) == 5, "not before its start"
    assert Times(None, 5, 9).at(STDOUT, 0) == 9 and Times(None, 5, None).at(STDOUT, 0) == 5
    assert Times(b"\0" * 7, 5, None).at(STDOUT, 0) == 5, "half a record is none"


class Kept:
    """An output of which the middle of stdout was not kept."""

    def __init__(self, data: bytes, hole: tuple[int, int]) -> None:
        self.data, self.hole = data, hole
        self.output = Output((len(data), 0), records((7, 1, len(data))), self.read)

    async def read(self, stream: int, start: int, length: int) -> tuple[int, bytes]:
        if self.hole[0] <= start < self.hole[1]:
            start = self.hole[1]
        end = min(start + length, len(self.data))
        return start, self.data[start : min(end, self.hole[0]) if start < self.hole[0] else end]


WORK = Work(id="exe_1", source="exec", cmd="c", began_ms=5)
DATA = b"".join(b"%06d\n" % n for n in range(2000))
HOLE = (1003, 7003)
"""Both ends are inside of lines."""
WANT = [
    *[f"{n:06}" for n in range(143)],
    "00",
    "[6000 bytes of stdout were not kept]",
    DATA[7003:7007].decode().rstrip("\n"),
    *[f"{n:06}" for n in range(1001, 2000)],
]


def told(entries: list[Any]) -> list[str]:
    return [entry.message for entry in entries]


def test_what_was_not_kept_is_said_where_it_was() -> None:
    cursor = [0, 0]
    found = asyncio.run(newest(WORK, Kept(DATA, HOLE).output, cursor, 5000, whole=True))
    assert told(found.entries) == WANT and cursor == [len(DATA), 0] and not found.left_out
    assert [entry.level for entry in found.entries].count("warning") == 1


@pytest.mark.parametrize("piece", [64, 1000, 100_000])
def test_going_on_piece_by_piece_tells_the_same(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_works, "PIECE_BYTES", piece)
    cursor, entries = [0, 0], list[Any]()
    for _ in range(10_000):
        found = asyncio.run(onwards(WORK, Kept(DATA, HOLE).output, cursor, 7, whole=True))
        entries += found.entries
        if cursor[0] == len(DATA):
            break
    assert told(entries) == WANT


@pytest.mark.parametrize("split", [0, 1, 500, 1001, 1003, 5000, 7003, 13_999])
def test_the_newest_and_then_what_comes_leave_nothing_out(split: int) -> None:
    whole = Kept(DATA, HOLE)
    part = Kept(DATA[:split], HOLE) if not HOLE[0] < split < HOLE[1] else Kept(DATA[: HOLE[0]], HOLE)
    cursor = [0, 0]
    entries = asyncio.run(newest(WORK, part.output, cursor, 5000, whole=False)).entries
    while cursor[0] < len(DATA):
        entries += asyncio.run(onwards(WORK, whole.output, cursor, 1000, whole=True)).entries
    assert told(entries) == WANT


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../etc"}, {"id": 1}, {"state": "odd"}, {"sizes": [1]}, {"sizes": [-1, 0]}, {"sizes": ["1", 0]},
        {"late": None}, {"started_at_ms": None}, {"started_at_ms": -1}, {"started_at_ms": 1 << 60},
    ],
)  # fmt: skip
def test_what_a_keeper_tells_of_its_commands_is_checked(change: dict[str, Any]) -> None:
    right = {"id": "exe_" + "0" * 26, "state": "running", "sizes": [0, 3], "late": [0, 0], "started_at_ms": 5}
    assert parse_sizes(json.dumps(right).encode())["sizes"] == [0, 3]
    with pytest.raises(HostRefused):
        parse_sizes(json.dumps(right | change).encode())
