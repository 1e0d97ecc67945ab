"""The clients over a real sshd with a stub of hostd behind it: answers, refusals, cuts, limits, what is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import struct
import threading
import time

import pytest

from hosts import client as client_module
from hosts import links, loop_links, streams
from hosts.client import AsyncHostClient, HostClient, HostRefused, HostUnreachable, StaleFence
from hosts.links import Breaker, Broken, Link, Where
from tests.ssh.loopback import Sshd, StubHostd

BOX, EXE = "dbx_" + "0" * 26, "exe_" + "0" * 26
ID = "hst_test"
BODY = {
    "command": "true",
    "env": {},
    "cwd": "/",
    "user": {"name": "u", "uid": 1, "gid": 1, "home": "/"},
    "stdin": "none",
}
STATE = {"ok": True, "id": EXE, "state": "running", "sizes": [0, 0]}


@pytest.fixture
def where(sshd: Sshd, stub: StubHostd):
    return lambda _host_id: Where(sshd.login(), str(stub.path), None)


@pytest.fixture
def link(where):
    link = Link(ID, where)
    yield link
    link.close()


@pytest.fixture
def client(link: Link) -> HostClient:
    return HostClient(ID, link)


@pytest.fixture
def in_loop(where, monkeypatch):
    """Run `work(client)` in a fresh loop."""
    monkeypatch.setattr(loop_links, "where_is", where)

    def run(work):
        async def main():
            try:
                return await asyncio.wait_for(work(AsyncHostClient(ID)), 30)
            finally:
                await loop_links.close_links()

        return asyncio.run(main())

    return run


@pytest.fixture
def hasty(monkeypatch):
    """Every limit of time a tenth."""
    for module in (client_module, streams):
        monkeypatch.setattr(module, "ASK_SECONDS", 0.6)
    monkeypatch.setattr(streams, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(loop_links, "PROBE_AFTER", 0.3)
    monkeypatch.setattr(loop_links, "DEAD_AFTER", 0.9)
    monkeypatch.setattr(loop_links, "WATCH_EVERY", 0.1)


def frames(data: bytes, trailer: dict | None) -> bytes:
    whole = b'{"ok":true,"offset":0}\n'
    for at in range(0, len(data), 65536):
        piece = data[at : at + 65536]
        whole += struct.pack(">I", len(piece)) + piece
    return whole if trailer is None else whole + struct.pack(">I", 0) + json.dumps(trailer).encode() + b"\n"


END = {"total": 200_000, "exit": 0, "reason": None, "complete": True}
DATA = bytes(range(250)) * 800


# --- both kinds answer alike ---


def both(client: HostClient, in_loop, verb: str, **arguments):
    """The answer of the threads' client, which the loop's must equal."""
    first = getattr(client, verb)(**arguments)
    second = in_loop(lambda loop_client: getattr(loop_client, verb)(**arguments))
    assert first == second
    return first


def test_a_verb_travels_and_its_answer_comes_back(client, in_loop, stub):
    stub.answers["spawn"] = lambda asked, body: STATE | {"pid": len(body)}
    answer = both(client, in_loop, "spawn", box=BOX, id=EXE, fence=7, body=BODY, hold_ms=10)
    assert answer["state"] == "running" and json.loads(stub.bodies[-1]) == BODY
    assert stub.requests[-1] == {
        "v": 1,
        "verb": "spawn",
        "body": len(stub.bodies[-1]),
        "box": BOX,
        "id": EXE,
        "fence": 7,
        "hold_ms": 10,
    }


def test_a_large_body_arrives_whole(client, in_loop, stub):
    stub.answers["stdin"] = lambda asked, body: {"ok": True, "accepted": len(body) == 1_000_000}
    assert both(client, in_loop, "stdin", box=BOX, id=EXE, request="r1", body=b"x" * 1_000_000) == {
        "ok": True,
        "accepted": True,
    }


def test_a_read_brings_its_body(client, in_loop, stub):
    head = {"ok": True, "size": 900_000, "offset": 100, "body": 500_000}
    stub.answers["read"] = lambda asked, body: json.dumps(head).encode() + b"\n" + b"y" * 500_000
    found = both(client, in_loop, "read", box=BOX, id=EXE, stream="stdout", offset=100, limit=500_000)
    assert (found.size, found.offset, found.data) == (900_000, 100, b"y" * 500_000)


def test_a_body_that_is_cut_is_no_answer(client, in_loop, stub):
    head = {"ok": True, "size": 900, "offset": 0, "body": 900}
    stub.answers["read"] = lambda asked, body: json.dumps(head).encode() + b"\n" + b"y" * 10
    arguments = {"box": BOX, "id": EXE, "stream": "stdout", "offset": 0, "limit": 900}
    with pytest.raises(HostUnreachable, match="before its answer was complete"):
        client.read(**arguments)
    with pytest.raises(HostUnreachable, match="before its answer was complete"):
        in_loop(lambda one: one.read(**arguments))


def test_a_body_over_the_limit_is_not_waited_for(client, stub):
    stub.answers["read"] = {"ok": True, "size": 1, "offset": 0, "body": 1 << 40}
    with pytest.raises(HostUnreachable, match="announced a body"):
        client.read(box=BOX, id=EXE, stream="stdout", offset=0, limit=10)


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_refusals_keep_their_code_and_fields(client, in_loop, stub, kind):
    def ask():
        if kind == "threads":
            return client.state(box=BOX, id=EXE)
        return in_loop(lambda one: one.state(box=BOX, id=EXE))

    stub.answers["state"] = {"error": {"code": "stale_fence", "message": "older", "fence": 9}}
    with pytest.raises(StaleFence) as stale:
        ask()
    assert stale.value.fence == 9 and stale.value.host_id == ID
    stub.answers["state"] = {"error": {"code": "unknown_id", "message": "no such"}}
    with pytest.raises(HostRefused) as refused:
        ask()
    assert refused.value.code == "unknown_id" and not isinstance(refused.value, StaleFence)
    stub.answers["state"] = b"nonsense\n"
    with pytest.raises(HostUnreachable, match="makes no sense"):
        ask()


def test_what_the_protocol_forbids_never_travels(client, stub):
    with pytest.raises(ValueError, match="box"):
        client.state(box="../../etc", id=EXE)
    assert not stub.requests


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_a_stream_is_followed_to_its_trailer(client, in_loop, stub, kind):
    stub.answers["follow"] = frames(DATA, END)
    if kind == "threads":
        with client.follow(box=BOX, id=EXE, stream="stdout") as output:
            got = b"".join(output)
    else:

        async def work(one):
            async with one.follow(box=BOX, id=EXE, stream="stdout") as output:
                return b"".join([piece async for piece in output]), output

        got, output = in_loop(work)
    assert got == DATA and output.trailer == END and output.start == 0


@pytest.mark.parametrize("kind", ["threads", "loop"])
@pytest.mark.parametrize("length", [30, 70_000, 199_999])
def test_a_cut_stream_never_looks_like_its_end(client, in_loop, stub, kind, length):
    whole = frames(DATA, END)
    stub.answers["follow"] = whole[:length]
    if kind == "threads":
        with client.follow(box=BOX, id=EXE, stream="stdout") as output:
            with pytest.raises(HostUnreachable, match="cut"):
                list(output)
    else:

        async def work(one):
            async with one.follow(box=BOX, id=EXE, stream="stdout") as output:
                with pytest.raises(HostUnreachable, match="cut"):
                    async for _ in output:
                        pass
                return output

        output = in_loop(work)
    assert output.trailer is None


def test_leaving_a_stream_early_leaves_nothing(client, link, stub, in_loop):
    stub.answers["follow"] = frames(b"z" * 3_000_000, None)
    with client.follow(box=BOX, id=EXE, stream="stdout") as output:
        next(iter(output))
    assert link._streams._value == links.STREAMS_AT_ONCE

    async def work(one):
        async with one.follow(box=BOX, id=EXE, stream="stdout") as output:
            async for _ in output:
                break
        for _ in range(100):
            if stub.open == 0 and not one._link._bulk[0].channels:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("a channel is left")

    in_loop(work)


# --- what is tried again ---


def test_a_channel_cut_before_an_answer_is_tried_once_more(client, in_loop, stub):
    for kind in ("threads", "loop"):
        answers = [b"", STATE]
        stub.answers["state"] = lambda asked, body, answers=answers: answers.pop(0)
        if kind == "threads":
            assert client.state(box=BOX, id=EXE)["state"] == "running"
        else:
            assert in_loop(lambda one: one.state(box=BOX, id=EXE))["state"] == "running"


def test_but_not_twice(client, stub):
    stub.answers["state"] = b""
    with pytest.raises(HostUnreachable):
        client.state(box=BOX, id=EXE)
    assert len(stub.requests) == 2


def test_a_restarted_sshd_is_dialled_again(client, sshd, stub):
    stub.answers["state"] = STATE
    client.state(box=BOX, id=EXE)
    sshd.stop()
    sshd.start()
    assert client.state(box=BOX, id=EXE)["state"] == "running"


def test_the_loops_connection_is_dialled_again(in_loop, sshd, stub):
    stub.answers["state"] = STATE

    async def work(one):
        await one.state(box=BOX, id=EXE)
        await asyncio.to_thread(sshd.stop)
        with pytest.raises(HostUnreachable):
            await one.state(box=BOX, id=EXE)
        await asyncio.to_thread(sshd.start)
        return await one.state(box=BOX, id=EXE)

    assert in_loop(work)["state"] == "running"


def test_a_refused_socket_wakes_hostd_and_goes_on(client, in_loop, sshd, where, monkeypatch, tmp_path, stub):
    stub.stop()
    woken = []

    def revive(host_id, deadline):
        woken.append(host_id)
        again = StubHostd(stub.path)
        again.answers["state"] = STATE
        again.start()
        woken.append(again)
        return True

    monkeypatch.setattr("hosts.revival.revive", revive)
    monkeypatch.setattr(loop_links, "revive", revive)
    assert client.state(box=BOX, id=EXE)["state"] == "running"
    assert woken[0] == ID
    woken.pop().stop()
    woken.clear()
    assert in_loop(lambda one: one.state(box=BOX, id=EXE))["state"] == "running"
    woken.pop().stop()


def test_a_hostd_that_cannot_be_woken_is_unreachable(client, stub, monkeypatch):
    stub.stop()

    def revive(host_id, deadline):
        raise HostUnreachable(host_id, "hostd does not answer and could not be started: no")

    monkeypatch.setattr("hosts.revival.revive", revive)
    with pytest.raises(HostUnreachable, match="could not be started"):
        client.state(box=BOX, id=EXE)


# --- limits ---


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_a_hostd_that_does_not_answer_is_left_in_time(client, in_loop, stub, hasty, kind):
    stub.answers["state"] = lambda asked, body: time.sleep(2) or STATE
    started_at = time.monotonic()
    with pytest.raises(HostUnreachable, match=r"in time|within"):
        client.state(box=BOX, id=EXE) if kind == "threads" else in_loop(lambda one: one.state(box=BOX, id=EXE))
    assert time.monotonic() - started_at < 1.5


def test_a_followed_hostd_that_does_not_answer_is_left_in_time(in_loop, stub, hasty):
    stub.answers["follow"] = lambda asked, body: time.sleep(2) or {"ok": True}

    async def work(one):
        async with one.follow(box=BOX, id=EXE, stream="stdout") as output:
            with pytest.raises(HostUnreachable, match="within"):
                await anext(aiter(output))

    started_at = time.monotonic()
    in_loop(work)
    assert time.monotonic() - started_at < 1.5


def test_a_stopped_sshd_cuts_streams_that_wait(client, in_loop, sshd, stub, hasty):
    stub.answers["follow"] = lambda asked, body: frames(b"first", None)[: -0 or None]
    # The stub closes after its answer, so a stream that waits is made of one that never answers its last byte.
    release = threading.Event()

    async def serve(asked, body, reader, writer):
        writer.write(frames(b"first", None))
        await writer.drain()
        while not release.is_set():
            await asyncio.sleep(0.02)
        return False

    stub._answer = serve

    async def work(one):
        async with one.follow(box=BOX, id=EXE, stream="stdout") as output:
            with pytest.raises(HostUnreachable):
                async for piece in output:
                    assert piece == b"first"
                    await asyncio.sleep(0.6)  # quiet, but alive: it was asked and has answered
                    sshd.signal_all(signal.SIGSTOP)

    started_at = time.monotonic()
    try:
        in_loop(work)
        assert time.monotonic() - started_at < 5
        sshd.signal_all(signal.SIGCONT)
        with client.follow(box=BOX, id=EXE, stream="stdout") as output, pytest.raises(HostUnreachable):
            for piece in output:
                assert piece == b"first"
                sshd.signal_all(signal.SIGSTOP)
    finally:
        sshd.signal_all(signal.SIGCONT)
        release.set()


def test_calls_at_once_are_capped(client, link, stub, monkeypatch):
    monkeypatch.setattr(links, "SLOT_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:
        for _ in range(links.CALLS_AT_ONCE):
            stack.enter_context(link.slot())
        with pytest.raises(HostUnreachable, match=f"{links.CALLS_AT_ONCE} calls"):
            client.state(box=BOX, id=EXE)
    stub.answers["state"] = STATE
    assert client.state(box=BOX, id=EXE)


def test_short_calls_and_streams_use_connections_of_their_own(client, link, stub):
    stub.answers["state"] = STATE
    stub.answers["follow"] = frames(DATA, END)
    client.state(box=BOX, id=EXE)
    with client.follow(box=BOX, id=EXE, stream="stdout") as output:
        list(output)
    assert link._control is not None and link._bulk and link._control is not link._bulk[0]


def test_many_threads_dial_once(where, stub, sshd):
    stub.answers["state"] = STATE
    link = Link(ID, where)
    failures = []

    def work():
        try:
            for _ in range(20):
                HostClient(ID, link).state(box=BOX, id=EXE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures and len(sshd.sessions()) <= 2  # one connection: its monitor and its session
    link.close()


# --- the event channel ---


def test_a_watch_hears_events_and_acknowledges(client, stub):
    exit = {"event": "exit", "box": BOX, "id": EXE, "exit": 0, "reason": None, "sizes": [0, 0], "dropped": [0, 0]}
    heard = []

    async def serve(asked, body, reader, writer):
        writer.write(b'{"ok":true}\n' + json.dumps(exit).encode() + b"\n" + b'{"event":"heartbeat","monotonic":1}\n')
        await writer.drain()
        heard.append(json.loads(await reader.readline()))
        return False

    stub._answer = serve
    with client.watch() as watching:
        events = watching.events(2)
        while len(events) < 2:
            events += watching.events(2)
        assert [event["event"] for event in events] == ["exit", "heartbeat"]
        watching.ack([(BOX, EXE)])
        with pytest.raises(HostUnreachable):
            watching.events(2)
    assert heard == [{"ack": [[BOX, EXE]]}]


def test_a_quiet_watch_is_an_empty_list(client, stub):
    async def serve(asked, body, reader, writer):
        writer.write(b'{"ok":true}\n')
        await writer.drain()
        await reader.read()
        return False

    stub._answer = serve
    with client.watch() as watching:
        assert watching.events(0.2) == []


# --- the breaker ---


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_opens_tries_and_closes():
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("cut", 2)
    breaker.check()
    breaker.failed("cut", 2)
    with pytest.raises(Broken, match="cut"):
        breaker.check()
    clock.now += 1
    breaker.check()  # the trial
    with pytest.raises(Broken):
        breaker.check()  # everybody else
    breaker.worked()
    breaker.check()
    breaker.check()


def test_the_breaker_opens_for_longer_each_time_but_not_for_ever():
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("dead", 4)
    pauses = []
    for _ in range(12):
        began = clock.now
        while True:
            clock.now += 0.05
            try:
                breaker.check()
                break
            except Broken:
                pass
        pauses.append(clock.now - began)
        breaker.failed("dead", 2)
    assert pauses[0] < 1 < pauses[3] and max(pauses) <= links.OPEN_SECONDS[1] * 1.25 + 0.1


def test_many_calls_that_fail_together_open_it_once():
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(16):
        breaker.failed("the deadline passed while another thread was dialling", 2)
    clock.now += links.OPEN_SECONDS[0] * 1.25
    breaker.check()  # the trial


def test_slow_verbs_open_it_only_after_several():
    breaker = Breaker(Clock())
    for _ in range(3):
        breaker.failed("slow", 1)
    breaker.check()
    breaker.failed("slow", 1)
    with pytest.raises(Broken):
        breaker.check()


def test_a_silent_host_gets_single_trials_and_one_answer_is_enough():
    clock = Clock()
    breaker = Breaker(clock)
    breaker.check(silent_for=None)
    breaker.check(silent_for=3)
    breaker.check(silent_for=60)  # the trial
    with pytest.raises(Broken, match="silent"):
        breaker.check(silent_for=60)
    breaker.worked()
    breaker.check(silent_for=62)  # the watcher may be behind; we have heard it ourselves
    clock.now += 30
    breaker.check(silent_for=90)
    with pytest.raises(Broken, match="silent"):
        breaker.check(silent_for=90)


def test_a_host_that_the_watcher_hears_again_is_asked_at_once():
    breaker = Breaker(Clock())
    breaker.check(silent_for=60)
    for _ in range(5):
        breaker.failed("dead", 2)
    with pytest.raises(Broken):
        breaker.check(silent_for=61)
    breaker.check(silent_for=0.5)
    breaker.check(silent_for=1)
    breaker.failed("dead", 4)
    with pytest.raises(Broken):
        breaker.check(silent_for=1)  # heard all the time, and yet it does not answer us


def test_a_refused_call_reads_first_whether_the_host_is_heard_again():
    quiet = [60.0, 60.0, 60.0, 0.5]
    login = Where(None, "/nowhere", 0)
    link = Link("hst_1", lambda host_id: dataclasses.replace(login, silent_for=quiet.pop(0)))
    link.breaker.check(60)  # the trial, which is still on
    with pytest.raises(HostUnreachable, match="silent"):
        link.open(time.monotonic() + 1)
    link._where_at -= links.WHERE_NEW_SECONDS
    with pytest.raises(HostUnreachable, match="silent"):
        link.open(time.monotonic() + 1)
    link._where_at -= links.WHERE_NEW_SECONDS

    class Dialled(Exception):
        pass

    def dial(*_):
        raise Dialled

    link._open = dial
    with pytest.raises(HostUnreachable, match="silent"):
        link.open(time.monotonic() + 1)
    link._where_at -= links.WHERE_NEW_SECONDS
    with pytest.raises(Dialled):
        link.open(time.monotonic() + 1)
