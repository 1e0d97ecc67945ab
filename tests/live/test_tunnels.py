"""Tunnels into real boxes: servers on their loopback, both versions of HTTP, streams, transfers, whose they are."""

from __future__ import annotations

import hashlib
import http.client
import json
import pathlib
import socket
import ssl
import time
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

pytestmark = pytest.mark.live

SERVER = pathlib.Path(__file__).with_name("boxed_server.py")
PIECE = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox with a server on its loopback, and its open tunnel."""
    box = berth.owner.create(name="tunnels", tunnel={})
    serve(berth, box, "127.0.0.1", 8000)
    yield box
    berth.owner.shutdown(box)


def serve(berth, box: str, address: str, port: int) -> None:
    path = "server.py"
    body = {"file_path": path, "contents": SERVER.read_text()}
    assert berth.owner.client.post(f"/v1/devboxes/{box}/write_file_contents", json=body).status_code == 200
    berth.owner.run(box, f"setsid python3 {path} {address} {port} > server.log 2>&1 &")
    listens = f"grep -qi ':{port:04x} ' /proc/net/tcp /proc/net/tcp6"
    ready = f"for i in $(seq 200); do {listens} && exit 0; sleep 0.1; done; exit 1"
    assert berth.owner.run(box, ready)[2] == 0, berth.owner.run(box, "cat server.log")


def tunnel_of(key, box: str) -> Any:
    return key.get(f"/v1/devboxes/{box}")["tunnel"]


def name_of(tunnel: Any, port: int = 8000) -> str:
    return f"{port}-{tunnel['tunnel_key']}.tunnel.example.test"


def ask(berth, tunnel: Any, path: str, *, port: int = 8000, method: str = "GET", **more: Any) -> httpx.Response:
    headers = {"host": name_of(tunnel, port), **more.pop("headers", {})}
    with httpx.Client(base_url=berth.base_url, timeout=60, http1=not more.get("http2"), **more) as client:
        return client.request(method, path, headers=headers)


def test_servers_on_every_address_of_the_box_answer(berth, shared) -> None:
    tunnel = tunnel_of(berth.owner, shared)
    told = ask(berth, tunnel, "/a%20b?c=d").json()
    assert (told["path"], told["from"]) == ("/a%20b?c=d", "127.0.0.1")
    got = {name.lower(): value for name, value in told["headers"]}
    assert got["host"] == name_of(tunnel) == got["x-forwarded-host"]
    assert got["x-forwarded-for"] == "127.0.0.1"
    assert ask(berth, tunnel, "/", http2=True).http_version == "HTTP/2"
    address = berth.owner.run(shared, "hostname -I")[0].split()[0]
    serve(berth, shared, address, 8001)
    assert ask(berth, tunnel, "/", port=8001).status_code == 200, "not on the loopback"
    nothing = ask(berth, tunnel, "/", port=8099)
    assert (nothing.status_code, nothing.json()["code"]) == (502, "nothing_listens")


def test_transfers_are_exact_both_ways(berth, shared) -> None:
    tunnel = tunnel_of(berth.owner, shared)
    seen = hashlib.sha256()
    headers = {"host": name_of(tunnel)}
    with httpx.stream("GET", f"{berth.base_url}/pour/256", headers=headers, timeout=120) as answer:
        for data in answer.iter_raw():
            seen.update(data)
    wanted = hashlib.sha256(PIECE * 256).hexdigest()
    assert seen.hexdigest() == wanted
    connection = http.client.HTTPConnection("127.0.0.1", int(berth.base_url.rsplit(":", 1)[1]), timeout=120)
    connection.putrequest("PUT", "/", skip_host=True)
    connection.putheader("Host", name_of(tunnel))
    connection.putheader("Content-Length", str(256 << 20))
    connection.endheaders()
    for _ in range(256):
        connection.send(PIECE)
    assert json.loads(connection.getresponse().read())["sha256"] == wanted
    connection.close()


def test_events_and_websockets_flow(berth, shared) -> None:
    tunnel = tunnel_of(berth.owner, shared)
    with httpx.stream("GET", f"{berth.base_url}/events", headers={"host": name_of(tunnel)}, timeout=20) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(5)] == ["data: 0", "", "data: 1", "", "data: 2"]
    port = int(berth.base_url.rsplit(":", 1)[1])
    with _reached(port) as sock, connect(f"ws://{name_of(tunnel)}:{port}/echo", sock=sock, proxy=None) as client:
        for message in ("hello", b"\x00" * 60_000):
            client.send(message)
            assert client.recv(timeout=20) == message


@pytest.mark.parametrize("http2", [False, True])
def test_the_tls_listener_serves_tunnels_and_the_api(berth, shared, http2: bool) -> None:
    tunnel, domain = tunnel_of(berth.owner, shared), berth.env["BERTH_DOMAIN"]
    trusted = ssl.create_default_context(cafile=berth.state.path / "tls" / "ca.pem")

    def https(name: str, path: str, **headers: str) -> httpx.Response:
        with httpx.Client(verify=trusted, http1=not http2, http2=http2, timeout=30) as client:
            asked = f"https://{berth.env['BERTH_TLS_BIND']}{path}"
            return client.get(asked, headers={"host": name, **headers}, extensions={"sni_hostname": name})

    answer = https(f"8000-{tunnel['tunnel_key']}.tunnel.{domain}", "/over-tls")
    assert (answer.status_code, answer.json()["path"]) == (200, "/over-tls")
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert ["x-forwarded-proto", "https"] in [[name.lower(), value] for name, value in answer.json()["headers"]]
    api = https(f"api.{domain}", f"/v1/devboxes/{shared}", authorization=f"Bearer {berth.owner.secret}")
    assert (api.status_code, api.json()["id"]) == (200, shared)


def _reached(port: int) -> Any:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_it_counts_as_use(berth, shared) -> None:
    ask(berth, tunnel_of(berth.owner, shared), "/")
    assert berth.owner.get(f"/v1/devboxes/{shared}")["last_activity_kind"] in ("tunnel", "command", "file")


def test_only_its_own_key_and_token_open_a_box(berth, shared) -> None:
    open_one = tunnel_of(berth.owner, shared)
    box = berth.owner.create(name="locked", tunnel={"auth_mode": "authenticated"})
    try:
        serve(berth, box, "127.0.0.1", 8000)
        locked = tunnel_of(berth.owner, box)
        assert ask(berth, locked, "/").status_code == 401
        own = {"x-runloop-tunnel-authorization": f"Bearer {locked['auth_token']}"}
        assert ask(berth, locked, "/", headers=own).status_code == 200
        pty = berth.owner.post(f"/v1/devboxes/{box}/create_pty_tunnel")
        assert ask(berth, pty, "/").status_code == 404, "a terminal's key opens no port"
        as_token = {"authorization": f"Bearer {pty['auth_token']}"}
        assert ask(berth, locked, "/", headers=as_token).status_code == 401
        assert ask(berth, locked, "/pty/x", port=13, headers=own).status_code == 401, "and a tunnel's no terminal"
        assert berth.stranger.client.post(f"/v1/devboxes/{box}/enable_tunnel").status_code == 404
        assert berth.owner.post(f"/v1/devboxes/{box}/remove_tunnel") == {}
        _gone(berth, locked, own)
        assert tunnel_of(berth.owner, box) is None
        fresh = berth.owner.post(f"/v1/devboxes/{box}/enable_tunnel")
        assert ask(berth, fresh, "/").status_code == 200
        assert ask(berth, open_one, "/").status_code == 200
    finally:
        berth.owner.shutdown(box)
    _gone(berth, fresh, {})


def _gone(berth, tunnel: Any, headers: dict[str, str]) -> None:
    deadline = time.monotonic() + 20
    while ask(berth, tunnel, "/", headers=headers).status_code != 404:
        assert time.monotonic() < deadline, "it opens still"
        time.sleep(0.5)


def test_a_request_wakes_a_suspended_box_and_is_answered_by_it(berth) -> None:
    box = berth.owner.create(
        name="sleeper",
        tunnel={"wake_on_http": True},
        entrypoint="python3 /home/user/server.py 127.0.0.1 8000",
        file_mounts={"/home/user/server.py": SERVER.read_text()},
    )
    try:
        tunnel = tunnel_of(berth.owner, box)
        deadline = time.monotonic() + 30
        while ask(berth, tunnel, "/").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        berth.owner.post(f"/v1/devboxes/{box}/suspend")
        berth.owner.wait(box, "suspended")
        answer = ask(berth, tunnel, "/woken", headers={"x-it": "1"})
        assert answer.status_code == 200 and answer.json()["path"] == "/woken", answer.text
        assert berth.owner.get(f"/v1/devboxes/{box}")["status"] == "running"
    finally:
        berth.owner.shutdown(box)
