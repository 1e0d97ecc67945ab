"""HTTP/1.1, cleartext HTTP/2 with prior knowledge, and the frame's promises, on one port of a real server."""

from __future__ import annotations

import asyncio
import socket
import time

import httpx
import pytest

from tests.sockets.conftest import start_granian


@pytest.mark.parametrize(("http1", "http2", "version"), [(True, False, "HTTP/1.1"), (False, True, "HTTP/2")])
def test_both_versions_of_http(served, key, http1, http2, version):
    with httpx.Client(base_url=served.url, http1=http1, http2=http2, headers=key.headers) as client:
        plain = client.get("/v1/accounts/me")
        assert (plain.http_version, plain.status_code) == (version, 200), plain.text
        assert plain.json()["id"] == key.account_id
        on_loop = client.post("/v1/t/x1/echo", content=b"y" * 300_000)
        assert (on_loop.http_version, on_loop.status_code) == (version, 200), on_loop.text
        assert on_loop.json() == {"length": 300_000, "version": "2" if http2 else "1.1", "id": "x1"}
        head = client.head("/v1/accounts/me")
        assert head.status_code == 200 and head.content == b""
        missing = client.get("/v1/nothing/here")
        assert missing.status_code == 404 and missing.json()["code"] == "not_found"


def test_many_requests_share_one_h2_connection(served, key):
    async def main() -> list[int]:
        async with httpx.AsyncClient(
            base_url=served.url, http1=False, http2=True, headers=key.headers, limits=httpx.Limits(max_connections=1)
        ) as client:
            answers = await asyncio.gather(*(client.post(f"/v1/t/{n}/echo", content=b"z") for n in range(100)))
        return [answer.status_code for answer in answers]

    assert asyncio.run(main()) == [200] * 100


def test_errors_tell_nothing_of_their_cause(served, key):
    failed = httpx.get(f"{served.url}/v1/t/fail", headers=key.headers)
    assert failed.status_code == 500
    assert set(failed.json()) == {"code", "message"} and failed.json()["code"] == "internal"
    assert "secret" not in failed.text and "Traceback" not in failed.text
    reference = failed.json()["message"].split()[-1]
    deadline = time.monotonic() + 5
    while served.log.count(reference) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.log.count(f"unexpected error {reference}") == 1
    refused = httpx.get(f"{served.url}/v1/t/refuse", headers=key.headers)
    assert (refused.status_code, refused.json()) == (400, {"code": "bad_request", "message": "not like this"})


def test_a_caller_who_leaves_frees_what_it_held(served, key):
    before = served.seen("cancelled", 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/t/hold", headers=key.headers, json={}, timeout=0.4)
    served.seen("cancelled", before + 1)
    before = served.seen("closed", 0)
    with httpx.stream("GET", f"{served.url}/v1/t/endless?slow=1", headers=key.headers) as answer:
        assert next(answer.iter_bytes()).startswith(b"start")
    served.seen("closed", before + 1)


def test_a_slow_reader_holds_the_source_back(served, key):
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(f"GET /v1/t/endless HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key.secret}\r\n\r\n".encode())
        raw.recv(1000)
        time.sleep(1.0)
        sent = served.seen("sent", 0)
        time.sleep(1.0)
        assert served.seen("sent", 0) == sent < 64 << 20


def test_a_broken_source_never_looks_like_an_end(served, key):
    for http2 in (False, True):
        with httpx.Client(base_url=served.url, http1=not http2, http2=http2, headers=key.headers) as client:
            with pytest.raises(httpx.TransportError):
                client.get("/v1/t/broken")


def test_nobody_unknown_makes_us_read_a_body(served):
    """A stranger's large body is refused before it has come."""
    for path, version in (("/v1/t/a/echo", "async"), ("/v1/apikeys", "bridge")):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.settimeout(5)
            raw.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n".encode())
            answer = raw.recv(4096)
            assert answer.startswith(b"HTTP/1.1 401"), (version, answer)


def test_a_body_over_the_bound_is_413(served, key):
    for path in ("/v1/t/a/echo", "/v1/apikeys"):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.settimeout(5)
            raw.sendall(
                f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key.secret}\r\n"
                "content-length: 500000000\r\n\r\n".encode()
            )
            answer = raw.recv(4096)
            assert answer.startswith(b"HTTP/1.1 413"), answer


@pytest.mark.parametrize("path", ["/v1/t/1/echo", "/v1/devboxes"])
def test_chunks_that_are_none_are_the_senders_fault(served, key, path):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: {key.headers['authorization']}\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
        client.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\nZZ\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_underscored_headers_do_not_pass_for_dashed_ones(served, key):
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(5)
        raw.sendall(
            f"POST /v1/apikeys HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx_request_id: {'a' * 300}\r\n"
            f"authorization: Bearer {key.secret}\r\ncontent-length: 2\r\n\r\n{{}}".encode()
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_reader_that_never_reads_is_given_up(redis_server, key, tmp_path):
    served = start_granian(tmp_path, redis_server.url, BERTH_SEND_IDLE="1")
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            authorization = key.headers["authorization"]
            client.sendall(f"GET /v1/t/endless HTTP/1.1\r\nhost: x\r\nauthorization: {authorization}\r\n\r\n".encode())
            served.seen("closed", 1, within=30)
        with httpx.stream("GET", f"{served.url}/v1/t/endless?slow=1", headers=key.headers) as answer:
            began, pieces = time.monotonic(), answer.iter_raw()
            while time.monotonic() - began < 2.5:
                assert next(pieces), "who reads, however slowly, is served on"
    finally:
        served.stop()


def test_streams_hear_that_the_server_stops(redis_server, key, tmp_path):
    served = start_granian(tmp_path, redis_server.url)
    try:
        with httpx.stream("GET", f"{served.url}/v1/t/until_down", headers=key.headers, timeout=10) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: up"
            served.process.terminate()
            assert [line for line in lines if line] == ["data: down"]
        assert served.process.wait(10) == 0
    finally:
        served.stop()


def test_a_restart_of_the_database_is_not_seen(served, key):
    """Every connection is cut while idle; the next requests connect again and succeed, on the loop and in threads."""
    from django.db import connection

    with httpx.Client(base_url=served.url, headers=key.headers) as client:

        def everything() -> set[int]:
            plain = {client.get("/v1/accounts/me").status_code for _ in range(12)}
            return plain | {client.post("/v1/t/a/echo", content=b"x").status_code for _ in range(12)}

        assert everything() == {200}
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            assert cursor.fetchone()[0] >= 2
        assert everything() == {200}
