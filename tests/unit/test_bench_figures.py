"""Rows of the bench: a partial run keeps the others, a failure is a row, what came once is counted once."""

import json
import pathlib
import resource

import pytest

from config import supervisor
from tests.bench import figures
from tests.bench.load import Taken, per_second
from tests.bench.wire import Events, Inbox, Server, Unexpected


def test_a_partial_run_replaces_its_rows_and_keeps_the_others(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "build" / "bench.json"
    figures.write(path, [figures.figure("a", "ms", [1.0]), figures.figure("b", "ms", [2.0], 4.0)], keep=False)
    figures.write(path, [figures.figure("a", "ms", [5.0]), figures.failed("c", "TimeoutError: no")], keep=True)
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert list(rows) == ["a", "b", "c"]
    assert (rows["a"]["median"], rows["b"]["ratio"], rows["c"]["error"]) == (5.0, 0.5, "TimeoutError: no")
    figures.write(path, [figures.figure("d", "ms", [1.0])], keep=False)
    assert [row["name"] for row in json.loads(path.read_text())] == ["d"]


def test_a_file_that_is_none_is_no_reason_to_lose_a_run(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("{")
    figures.write(path, [figures.figure("a", "ms", [1.0])], keep=True)
    assert len(json.loads(path.read_text())) == 1


def test_the_table_shows_failures() -> None:
    assert "c: TimeoutError: no" in figures.table([figures.failed("c", "TimeoutError: no")])


def test_rates_leave_out_seconds_that_are_not_whole() -> None:
    taken = [Taken(at=100 + number / 10, ms=1.0) for number in range(45)]
    assert per_second(taken) == [10.0, 10.0, 10.0]


def test_an_answer_is_whole_only_when_all_of_it_came() -> None:
    inbox = Inbox()
    assert inbox.feed(b"HTTP/1.1 200 OK\r\nContent-Le") is None
    assert inbox.feed(b"ngth: 4\r\n\r\n{") is None
    answer = inbox.feed(b'"":')
    assert answer is not None and answer.body == b'{"":'
    with pytest.raises(Unexpected):
        inbox.feed(b"")


def test_events_are_found_in_chunks_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b': hello\n\ndata: {"output":"a\\r\\nb","offset":4}\n\nevent: error\ndata: {"code":408}\n\n'
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:13], body[13:20], body[20:])) + b"0\r\n\r\n"
    )
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks
    for size in (1, 2, 3, 7, 64, len(raw)):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]

        class Socket:
            """Gives out the pieces."""

            def __init__(self, pieces: list[bytes]) -> None:
                self.pieces = pieces

            def sendall(self, data: bytes) -> None:
                assert data.startswith(b"GET /x HTTP/1.1\r\n")

            def setblocking(self, flag: bool) -> None:
                assert not flag

            def recv(self, most: int) -> bytes:
                return self.pieces.pop(0) if self.pieces else b""

        monkeypatch.setattr(Server, "connect", lambda self, pieces=pieces: Socket(pieces))
        stream, found = Events(Server("http://x:1", "k"), "/x"), []
        while not stream.ended:
            found += stream.read()
        assert [(event.name, event.data) for event in found] == [
            ("", {"output": "a\r\nb", "offset": 4}),
            ("error", {"code": 408}),
        ], size


def test_more_open_files_are_asked_for_or_missed_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: asked.append(both))
    supervisor.raise_open_files(said.append)  # type: ignore[arg-type]
    assert (asked, said) == ([(1024, supervisor.OPEN_FILES)], [])

    def refuse(_: int, both: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    supervisor.raise_open_files(said.append)  # type: ignore[arg-type]
    assert "4096 open files" in said[0]
