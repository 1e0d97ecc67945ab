"""Tunnels on a real server, in front of servers of every kind: what passes, what is changed, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis
from django.db import connection

from tests.conftest import Party
from tests.sockets.conftest import Granian, start_granian
from tests.sockets.tunnels import DOMAIN, Devbox, saying, serving, tell


@pytest.fixture
def devbox(served: Granian, key: Party) -> Devbox:
    return Devbox(served, key.account_id)


@pytest.fixture(scope="module")
def telling() -> Iterator[int]:
    with serving(tell) as port:
        yield port


def headers_of(answer: httpx.Response) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in answer.json()["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


@pytest.mark.parametrize("http2", [False, True])
def test_a_request_arrives_as_it_was_made(devbox: Devbox, telling: int, http2: bool) -> None:
    answer = devbox.ask(
        telling,
        "/a%2Fb/%C3%A4?x=1&x=%20",
        http2=http2,
        headers={
            "authorization": "Bearer the-app's-own",
            "cookie": "a=1; b=2",
            "x-runloop-tunnel-authorization": "Bearer never-passed-on",
            "x-forwarded-for": "10.9.9.9",
            "x-forwarded-proto": "gopher",
            "x-forwarded-host": "evil.example",
            "x_forwarded_for": "1.1.1.1",
            "te": "trailers",
            "proxy-authorization": "Basic x",
        },
    )
    assert answer.status_code == 200, answer.text
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert answer.json()["line"] == "GET /a%2Fb/%C3%A4?x=1&x=%20 HTTP/1.1"
    got = headers_of(answer)
    assert got["host"] == [devbox.host(telling)] == got["x-forwarded-host"]
    assert got["authorization"] == ["Bearer the-app's-own"]
    assert got["cookie"] == ["a=1; b=2"] or sorted(got["cookie"]) == ["a=1", "b=2"]
    assert got["x-forwarded-for"] == ["10.9.9.9, 127.0.0.1"]
    assert got["x-forwarded-proto"] == ["http"]
    dropped = {"x-runloop-tunnel-authorization", "x_forwarded_for", "te", "proxy-authorization", "connection"}
    assert not dropped & set(got)
    assert "content-length" not in got and "transfer-encoding" not in got


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("announced", [False, True])
def test_bodies_arrive_whole_and_framed_once(devbox: Devbox, telling: int, http2: bool, announced: bool) -> None:
    data = os.urandom(3_000_000)

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(data), 100_000):
            yield data[at : at + 100_000]

    answer = devbox.ask(telling, method="POST", http2=http2, content=data if announced else pieces())
    assert answer.status_code == 200, answer.text
    assert (answer.json()["length"], answer.json()["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    got = headers_of(answer)
    assert ("content-length" in got, "transfer-encoding" in got) == (announced, not announced)
    assert devbox.ask(telling, method="POST", http2=http2, content=b"").json()["length"] == 0


def test_connections_are_kept_but_never_for_what_may_not_be_repeated(devbox: Devbox, telling: int) -> None:
    counts = [devbox.ask(telling).json()["request"] for _ in range(4)]
    assert counts == [1, 2, 3, 4]
    assert devbox.ask(telling, method="POST", content=b"x").json()["request"] == 1


def test_a_kept_connection_that_ended_costs_nobody_an_answer(devbox: Devbox) -> None:
    once = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    with serving(once) as port:
        for _ in range(20):
            assert devbox.ask(port).text == "ok"


def test_hop_by_hop_headers_and_domains_of_cookies_stay_behind(devbox: Devbox) -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, x-private\r\nKeep-Alive: timeout=5\r\nX-Private: secret\r\n"
        b"X-Public: yes\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\nContent-Length: 4\r\n"
        b"Set-Cookie: a=1; Domain=.example.test; Path=/\r\nSet-Cookie: b=2; path=/;domain=example.test\r\n"
        b"Set-Cookie: c=domain=3; DOMAIN ; Secure\r\nSet-Cookie: d=4; HttpOnly\r\n\r\nbody"
    )
    with serving(saying(answer)) as port:
        got = devbox.ask(port)
    assert (got.text, got.headers["x-public"]) == ("body", "yes")
    assert not {"x-private", "keep-alive", "proxy-authenticate", "upgrade"} & set(got.headers)
    assert got.headers.get_list("set-cookie") == ["a=1; Path=/", "b=2; path=/", "c=domain=3; Secure", "d=4; HttpOnly"]


GARBAGE = {
    "no HTTP": b"this is no HTTP\r\n\r\n",
    "nothing": b"",
    "endless": b"\x00\xff" * 40_000,
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(300)) + b"\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab",
    "a bad name": b"HTTP/1.1 200 OK\r\nBad Header: x\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a bad status": b"HTTP/1.1 99 Low\r\n\r\n",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_502_with_a_reason(devbox: Devbox, kind: str) -> None:
    with serving(saying(GARBAGE[kind])) as port:
        got = devbox.ask(port)
    assert (got.status_code, got.json()["code"]) == (502, "bad_gateway")
    assert "server in the devbox" in got.json()["message"]


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"zz\r\nnonsense"),
    ],
)
def test_half_an_answer_never_looks_like_a_whole_one(devbox: Devbox, answer: bytes, after: bytes) -> None:
    with serving(saying(answer, after=after)) as port:
        for http2 in (False, True):
            with pytest.raises(httpx.TransportError):
                devbox.ask(port, http2=http2)


def test_what_comes_behind_an_answer_reaches_nobody(devbox: Devbox) -> None:
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    with serving(saying(smuggled, keep=True)) as port:
        assert [devbox.ask(port).text for _ in range(3)] == ["ok"] * 3


def test_old_servers_and_answers_without_a_body(devbox: Devbox, telling: int) -> None:
    with serving(saying(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end")) as port:
        assert devbox.ask(port).text == "until the end"
    with serving(saying(b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 99\r\n\r\n")) as port:
        assert devbox.ask(port).status_code == 304
    with serving(saying(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")) as port:
        assert devbox.ask(port).status_code == 204
    head = devbox.ask(telling, method="HEAD")
    assert head.status_code == 200 and int(head.headers["content-length"]) > 0 and not head.content


def test_events_come_as_they_are_sent(devbox: Devbox) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: one\n\n"
    with serving(saying(head, after=b"data: two\n\n", keep=True)) as port:
        with httpx.stream("GET", devbox.served.url, headers={"host": devbox.host(port)}, timeout=20) as answer:
            events = answer.iter_raw()
            assert next(events) == b"data: one\n\n"
            assert next(events) == b"data: two\n\n"


def test_an_answer_may_come_before_the_request_is_whole(devbox: Devbox) -> None:
    early = saying(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nstop")
    with serving(early) as port:
        with socket.create_connection(("127.0.0.1", devbox.served.port), timeout=20) as sock:
            host = devbox.host(port).encode()
            sock.sendall(b"POST / HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 1000000\r\n\r\nonly a bit")
            answer = sock.recv(65536)
            while b"stop" not in answer:
                more = sock.recv(65536)
                assert more, answer
                answer += more
        assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "smuggling",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: x\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: x\r\n\r\n",
        b"Content-Length: +5\r\n\r\nhello",
    ],
)
def test_a_request_of_two_meanings_never_becomes_two(devbox: Devbox, telling: int, smuggling: bytes) -> None:
    answer = devbox.raw(telling, b"POST /one HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n" + smuggling)
    assert b"/evil" not in answer and answer.count(b'"line"') <= 1
    assert devbox.ask(telling, "/after").json()["line"] == "GET /after HTTP/1.1"


def test_names_that_lead_nowhere(devbox: Devbox, telling: int) -> None:
    mine = devbox.view["tunnel_key"]
    for name in (f"0-{mine}", f"65536-{mine}", f"0{telling}-{mine}", f"{telling}-{mine}x", f"{telling}-short"):
        answer = httpx.get(devbox.served.url, headers={"host": f"{name}.{DOMAIN}"})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), name
    two = devbox.raw(telling, b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: api.example.test\r\nConnection: close\r\n\r\n")
    assert two.split(b" ", 2)[1] in (b"400", b"404")
    answer = devbox.ask(1)
    assert (answer.status_code, answer.json()["code"]) == (502, "nothing_listens")
    assert "nothing listens on port 1" in answer.json()["message"]
    assert devbox.ask(telling, headers={"host": devbox.host(telling).upper() + ":443"}).status_code == 200


def test_limits_are_named(devbox: Devbox, telling: int) -> None:
    long = devbox.ask(telling, "/" + "x" * 20_000)
    assert (long.status_code, long.json()["code"]) == (414, "target_too_long")
    many = devbox.ask(telling, headers={f"x-{n}": "y" for n in range(201)})
    assert many.status_code == 431
    assert devbox.ask(telling, headers={"x-large": "y" * 70_000}).status_code == 431


def test_an_authenticated_tunnel(served: Granian, key: Party, telling: int) -> None:
    devbox = Devbox(served, key.account_id, auth_mode="authenticated")
    token = devbox.view["auth_token"]
    assert devbox.ask(telling).status_code == 401
    for wrong in ("nope", token[:-1], key.secret):
        assert devbox.ask(telling, headers={"authorization": f"Bearer {wrong}"}).status_code == 401
    ours = devbox.ask(
        telling, headers={"x-runloop-tunnel-authorization": f"Bearer {token}", "authorization": "Basic b"}
    )
    got = headers_of(ours)
    assert got["authorization"] == ["Basic b"] and "x-runloop-tunnel-authorization" not in got
    theirs = headers_of(devbox.ask(telling, headers={"authorization": f"Bearer {token}"}))
    assert "authorization" not in theirs
    other = Devbox(served, key.account_id, auth_mode="authenticated")
    assert other.ask(telling, headers={"authorization": f"Bearer {token}"}).status_code == 401


def test_guessing_is_slowed_and_leaves_others_alone(served: Granian, key: Party, devbox: Devbox, telling: int) -> None:
    locked = Devbox(served, key.account_id, auth_mode="authenticated")
    # Each guesser has an address of its own.
    for source, guess in (
        ("127.0.0.2", lambda n: {"host": f"{telling}-{n:026d}.{DOMAIN}"}),
        ("127.0.0.3", lambda n: {"host": locked.host(telling), "authorization": f"Bearer guess-{n}"}),
    ):
        with httpx.Client(transport=httpx.HTTPTransport(local_address=source), base_url=served.url) as guesser:
            assert guesser.get("/", headers={"host": devbox.host(telling)}).status_code == 200
            answers = [guesser.get("/", headers=guess(number)) for number in range(60)]
            assert [answer.status_code for answer in answers[:15]] == [answers[0].status_code] * 15
            assert answers[-1].status_code == 429 and "retry-after" in answers[-1].headers
            still = guesser.get("/", headers={"host": devbox.host(telling)})
            assert still.status_code == 200, "a key in use goes on opening"
    assert Devbox(served, key.account_id).ask(telling).status_code == 200, "from another address"


def test_a_removed_tunnel_and_an_ended_devbox(served: Granian, key: Party, telling: int) -> None:
    for end in (
        "DELETE FROM tunnels_tunnel WHERE devbox_id = %s",
        "UPDATE devboxes_devbox SET ended_at = now() WHERE id = %s",
    ):
        devbox = Devbox(served, key.account_id)
        assert devbox.ask(telling).status_code == 200
        stream = saying(b"HTTP/1.1 200 OK\r\n\r\nbegun", keep=True)
        with serving(stream) as port:
            with httpx.stream("GET", served.url, headers={"host": devbox.host(port)}, timeout=30) as answer:
                pieces = answer.iter_raw()
                assert next(pieces) == b"begun"
                with connection.cursor() as cursor:
                    cursor.execute(end, [devbox.id])
                with pytest.raises(httpx.TransportError):
                    next(pieces)
        deadline = time.monotonic() + 30
        while devbox.ask(telling).status_code != 404:
            assert time.monotonic() < deadline, "it opens still"
            time.sleep(0.2)


def test_a_devbox_that_sleeps_says_so(devbox: Devbox, telling: int) -> None:
    devbox.set(status="suspended", step="suspended")
    asleep = devbox.ask(telling)
    assert (asleep.status_code, asleep.json()["code"]) == (503, "unavailable")
    assert "suspended" in asleep.json()["message"] and "retry-after" in asleep.headers


def test_the_request_that_wakes_a_devbox_is_held_and_passed_on(
    served: Granian, key: Party, telling: int, redis_server: Any
) -> None:
    devbox = Devbox(served, key.account_id, wake_on_http=True)
    devbox.set(status="suspended", step="suspended", wants="suspended")
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(devbox.ask, telling, "/woken", "POST", content=b"x" * 100_000)
        deadline = time.monotonic() + 20
        while devbox.get("status") != "provisioning":
            assert time.monotonic() < deadline and not asking.done(), "nobody asked for its resume"
            time.sleep(0.05)
        assert devbox.get("wants") == "running"
        time.sleep(0.5)
        assert not asking.done()
        devbox.set(status="running", step="running")
        redis.Redis.from_url(redis_server.url).publish("hints", devbox.id)
        answer = asking.result(30)
    assert (answer.status_code, answer.json()["line"]) == (200, "POST /woken HTTP/1.1")
    assert answer.json()["length"] == 100_000


def test_use_is_noted(served: Granian, key: Party, telling: int) -> None:
    for counts in (True, False):
        devbox = Devbox(served, key.account_id, http_keep_alive=counts)
        assert devbox.ask(telling).status_code == 200
        assert devbox.get("last_activity_kind") == ("tunnel" if counts else "")


def test_large_transfers_pass_in_flat_memory(devbox: Devbox) -> None:
    size = 256 << 20
    piece = os.urandom(1 << 20)
    wanted = hashlib.sha256(piece * (size >> 20)).hexdigest()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 20):
            writer.write(piece)
            await writer.drain()

    def resident() -> int:
        found = 0
        for child in _tree(devbox.served.process.pid):
            with open(f"/proc/{child}/statm") as file:
                found = max(found, int(file.read().split()[1]) * 4096)
        return found

    before = resident()
    with serving(pour) as port:
        seen, largest = hashlib.sha256(), 0
        with httpx.stream("GET", devbox.served.url, headers={"host": devbox.host(port)}, timeout=60) as answer:
            for number, data in enumerate(answer.iter_raw(1 << 20)):
                seen.update(data)
                if number % 32 == 0:
                    largest = max(largest, resident())
    assert seen.hexdigest() == wanted
    with serving(tell) as port:
        conn = http.client.HTTPConnection("127.0.0.1", devbox.served.port, timeout=60)
        conn.putrequest("PUT", "/", skip_host=True)
        for name, value in (("Host", devbox.host(port)), ("Content-Length", str(size))):
            conn.putheader(name, value)
        conn.endheaders()
        for number in range(size >> 20):
            conn.send(piece)
            if number % 32 == 0:
                largest = max(largest, resident())
        told = json.loads(conn.getresponse().read())
        conn.close()
    assert (told["length"], told["sha256"]) == (size, wanted)
    assert largest - before < 64 << 20, f"{(largest - before) >> 20} MiB more"


def test_a_client_that_does_not_read_holds_the_server_back(devbox: Devbox) -> None:
    poured = [0]

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            poured[0] += 1 << 16

    with serving(pour) as port, socket.create_connection(("127.0.0.1", devbox.served.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: " + devbox.host(port).encode() + b"\r\n\r\n")
        slow.recv(1000)
        deadline, before = time.monotonic() + 30, -1
        while poured[0] != before:
            assert time.monotonic() < deadline and poured[0] < 256 << 20, "it is not held back"
            before = poured[0]
            time.sleep(1.0)
    # Once it has left, the server is left too.
    with serving(tell) as port:
        assert devbox.ask(port).status_code == 200


def test_a_stop_does_not_wait_for_what_never_ends(
    key: Party, redis_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    served = start_granian(tmp_path_factory.mktemp("stopped"), redis_server.url)
    try:
        devbox = Devbox(served, key.account_id)
        with serving(saying(b"HTTP/1.1 200 OK\r\n\r\nbegun", keep=True)) as port:
            with httpx.stream("GET", served.url, headers={"host": devbox.host(port)}, timeout=60) as answer:
                pieces = answer.iter_raw()
                assert next(pieces) == b"begun"
                served.process.terminate()
                with pytest.raises(httpx.TransportError):
                    next(pieces)
        assert served.process.wait(30) is not None
    finally:
        served.stop()


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        try:
            with open(f"/proc/{one}/task/{one}/children") as file:
                found += [int(child) for child in file.read().split()]
        except FileNotFoundError:
            pass
    return found
