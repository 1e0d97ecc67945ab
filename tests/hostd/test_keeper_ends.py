"""What is told of a command's end, and what is left of its output once it is stored elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.hostd.bare_box import USER, Box, Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(31)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "exe_" + "".join(c for c in request.node.name.lower() if c.isalnum())[-60:]


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def test_a_stored_output_is_forgotten_and_its_followers_are_told(box: Box, name: str) -> None:
    """Whoever has the output has the exit; what came after the exit stays here."""
    box.spawn(name, "(sleep 0.3; echo late) & yes 0123456 | head -c 3000000")
    box.wait(name)
    assert box.exit_event(name)
    client = box.open(verb="follow", id=name, stream="stdout", offset=0)
    client.line()
    taken = client.file.read(1000)
    wait_until(lambda: os.path.exists(f"{box.out}/{name}.1.late"))
    assert box.ask(verb="forget", ids=[name], fence=1)["ok"]
    assert not os.path.exists(f"{box.out}/{name}.1") and box.file(name, "1.late") == b"late\n"
    assert name not in {e["id"] for e in box.ask(verb="list")["executions"]}, "acknowledged"
    rest = taken + client.file.read()
    length, trailer = 0, b""
    while True:
        frame = int.from_bytes(rest[length : length + 4], "big")
        if frame == 0 or length + 4 + frame > len(rest):
            trailer = rest[length + 4 :]
            break
        length += 4 + frame
    assert not trailer.endswith(b"\n") or json.loads(trailer) | {"total": 0} == {
        "total": 0,
        "exit": 0,
        "reason": None,
        "complete": False,
        "moved": True,
    }, "cut, or told that it moved; never complete"
    client.__exit__()
    with box.open(verb="follow", id=name, stream="stdout", offset=3_000_000) as client:
        assert client.line()["error"]["code"] == "unknown_id"
    box.kill_keeper()
    assert box.ask(verb="state", id=name)["sizes"] == [3_000_000, 0]


def test_a_cap_of_its_own(box: Box, name: str) -> None:
    raw = json.dumps({"command": "seq 1 1000000", "user": USER}).encode()
    box.ask(verb="spawn", id=name, fence=1, cap=64 << 10, raw=raw)
    answer = box.wait(name)
    assert answer["sizes"][0] == 6_888_896
    assert answer["sizes"][0] - answer["dropped"][0] < 128 << 10
    assert box.ask(verb="spawn", id=name + "b", fence=1, cap=1, raw=raw)["error"]["code"] == "bad_request"


def test_the_first_byte_and_the_signal_are_told(box: Box, name: str) -> None:
    answer = box.run(name, "sleep 0.3; echo first; sleep 0.2; echo second >&2; kill -9 $$")
    assert answer["exit"] == 137 and answer["reason"] == {"kind": "signal", "signal": 9}
    waited = answer["first_byte_at_ms"] - answer["started_at_ms"]
    assert 250 <= waited < answer["exited_at_ms"] - answer["started_at_ms"] - 150
    assert box.exit_event(name)["first_byte_at_ms"] == answer["first_byte_at_ms"]
    assert "first_byte_at_ms" not in box.run(name + "b", "exit 143")
    assert box.ask(verb="state", id=name + "b")["reason"] is None, "an exit status that looks like a signal is none"
    box.kill_keeper()
    assert box.ask(verb="state", id=name)["first_byte_at_ms"] == answer["first_byte_at_ms"]
