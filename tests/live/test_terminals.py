"""Terminals of real boxes over real WebSockets: by a tunnel's host name with its token, and by an API key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

from config import sdk
from config.state import CHECKOUT

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox for all of them."""
    box = berth.owner.create(name="terminals", environment_variables={"COLOUR": "sea green"})
    yield box
    berth.owner.shutdown(box)


def port_of(berth) -> str:
    return str(berth.base_url.rsplit(":", 1)[1])


@contextlib.contextmanager
def terminal(berth, box: str, name: str, key: Any = None, **query: str) -> Iterator[ClientConnection]:
    """Attached on the API's host by an API key."""
    asked = "&".join(f"{field}={value}" for field, value in {"devbox_id": box, **query}.items())
    url = f"{berth.base_url.replace('http', 'ws')}/pty/{name}/attach?{asked}"
    headers = {"authorization": f"Bearer {(key or berth.owner).secret}"}
    with connect(url, additional_headers=headers, max_size=None, proxy=None) as client:
        yield client


@contextlib.contextmanager
def through_tunnel(berth, key: str, token: str, name: str, **query: str) -> Iterator[ClientConnection]:
    """Attached as the published command line does it: the token is the subprotocol."""
    host = f"13-{key}.tunnel.example.test:{port_of(berth)}"
    asked = "&".join(f"{field}={value}" for field, value in query.items())
    url = f"ws://{host}/pty/{name}/attach?{asked}"
    reached = socket.create_connection(("127.0.0.1", int(port_of(berth))))
    with connect(url, sock=reached, subprotocols=[Subprotocol(token)], max_size=None, proxy=None) as attached:
        assert attached.subprotocol == token
        yield attached


def until(client: ClientConnection, wanted: bytes, seconds: float = 20) -> bytes:
    seen, deadline = b"", time.monotonic() + seconds
    while wanted not in seen:
        data = client.recv(timeout=max(0.1, deadline - time.monotonic()))
        assert isinstance(data, bytes)
        seen += data
    return seen


def closed(client: ClientConnection, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    try:
        while True:
            client.recv(timeout=max(0.1, deadline - time.monotonic()))
    except ConnectionClosed as end:
        assert end.rcvd is not None
        return int(end.rcvd.code)


def refusal(attach: Any) -> int:
    with pytest.raises(InvalidStatus) as refused, attach:
        pass
    return int(refused.value.response.status_code)


def session(key, box: str, name: str, **query: Any) -> httpx.Response:
    answer: httpx.Response = key.client.get(f"/pty/{name}", params={"devbox_id": box, **query})
    return answer


def control(key, box: str, name: str, **body: Any) -> httpx.Response:
    answer: httpx.Response = key.client.post(f"/pty/{name}/control", params={"devbox_id": box}, json=body)
    return answer


def test_as_the_command_line_does_it(berth, shared) -> None:
    made = berth.owner.post(f"/v1/devboxes/{shared}/create_pty_tunnel")
    key, token = made["tunnel_key"], made["auth_token"]
    host = {"host": f"13-{key}.tunnel.example.test", "authorization": f"Bearer {token}"}
    with httpx.Client(base_url=berth.base_url, headers=host, trust_env=False) as there:
        answer = there.get(f"/pty/{shared}?cols=120&rows=33").json()
        assert answer["connect_url"] == f"/pty/{shared}/attach"
        assert (answer["created"], answer["cols"], answer["rows"]) == (True, 120, 33)
        assert answer["idle_ttl_seconds"] == 300
        with through_tunnel(berth, key, token, shared) as client:
            resize = {"action": "resize", "cols": 99, "rows": 22}
            assert there.post(f"/pty/{shared}/control", json=resize).json()["status"] == "ready"
            client.send("\r")
            client.send(b"stty size; echo $COLOUR $TERM; id -un; pw''d\n")
            seen = until(client, b"/home/user\r\n").decode()
            assert re.search(r"22 99\r\nsea green xterm-256color\r\nuser\r\n/home/user\r\n", seen), seen
            client.send("exit\n")
            assert closed(client) == 4000
        assert there.get("/v1/accounts/me").status_code == 404, "the key opens nothing else"
        assert there.get("/healthz").status_code == 404
    for wrong in ({"authorization": "Bearer " + token[:-1] + "_"}, {}, {"host": "13-" + "0" * 26 + ".tunnel.x"}):
        headers = {**{name: value for name, value in host.items() if wrong or name == "host"}, **wrong}
        assert httpx.get(f"{berth.base_url}/pty/x", headers=headers, trust_env=False).status_code == 401
    assert refusal(through_tunnel(berth, key, "wrong", "x")) == 401
    berth.rows("UPDATE pty_ptytunnel SET expires_at = now() RETURNING 1")
    assert httpx.get(f"{berth.base_url}/pty/x", headers=host, trust_env=False).status_code == 401


@contextlib.contextmanager
def proxied(berth, box: str) -> Iterator[str]:
    """`manage.py pty_proxy` for a devbox; its origin."""
    argv = [sys.executable, "manage.py", "pty_proxy", "--devbox", box, "--port", "0", "--server", berth.base_url]
    environment = {**os.environ, "RUNLOOP_API_KEY": berth.owner.secret}
    proxy = subprocess.Popen(argv, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout is not None
        yield proxy.stdout.readline().strip().removeprefix("RUNLOOP_PTY_URL=")
    finally:
        proxy.terminate()
        assert proxy.wait(20) == 0


def test_as_the_command_line_does_it_through_the_proxy(berth, shared) -> None:
    with proxied(berth, shared) as origin, httpx.Client(base_url=origin, trust_env=False) as there:
        # Another devbox's name is none of the client's business here.
        answer = there.get("/pty/local", params={"cols": 100, "rows": 30, "devbox_id": "dbx_" + "0" * 26}).json()
        assert (answer["status"], answer["cols"], answer["rows"]) == ("ready", 100, 30)
        with connect(origin.replace("http", "ws") + answer["connect_url"], max_size=None, proxy=None) as client:
            resize = {"action": "resize", "cols": 91, "rows": 21}
            assert there.post("/pty/local/control", json=resize).json()["status"] == "ready"
            client.send("\r")
            client.send("stty size; seq 1 100000 | md5sum; echo $COLOUR\nexit\n")
            seen = until(client, b"sea green\r\n")
            assert b"21 91\r\n" in seen
            assert hashlib.md5("".join(f"{n}\n" for n in range(1, 100_001)).encode()).hexdigest().encode() in seen
            assert closed(client) == 4000
        assert there.post("/pty/local/control", json={"action": "close"}).status_code == 404
        for path, headers, status in (
            ("/v1/devboxes", {}, 404),
            ("/pty/../v1/devboxes", {}, 404),
            ("/pty/x", {"origin": "http://evil.example"}, 403),
            ("/pty/x", {"host": "evil.example:5000"}, 403),
            ("/pty/x", {"x": "y" * 20_000}, 431),
        ):
            request = there.build_request("GET", origin + "/", headers=headers)
            request.url = request.url.copy_with(raw_path=path.encode())
            assert there.send(request).status_code == status, path
        with pytest.raises(InvalidStatus) as refused:
            connect(origin.replace("http", "ws") + "/pty/x/attach", origin=Origin("http://evil.example"), proxy=None)
        assert refused.value.response.status_code == 403


@pytest.fixture(scope="module")
def node_client() -> Path:
    """The client made of what the published command line is made of."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on this machine")
    script = sdk.websocket_client() / "pty_client.mjs"
    shutil.copy(Path(__file__).with_name("pty_client.mjs"), script)
    return script


def node(script: Path, given: dict[str, Any], typed: bytes | None) -> bytes:
    """What the client printed; it must end as after an ordinary end of the shell."""
    argv = ["node", str(script), json.dumps(given)]
    done = subprocess.run(argv, input=typed or b"", capture_output=True, timeout=60)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize("typed", [True, False], ids=["interactive", "command"])
def test_with_the_libraries_of_the_command_line(berth, shared, node_client: Path, typed: bool) -> None:
    line = "stty size; echo $COLOUR; seq 1 20000 | md5sum"
    want = hashlib.md5("".join(f"{n}\n" for n in range(1, 20_001)).encode()).hexdigest()
    how = {} if typed else {"command": line}
    tunnel = {"api": berth.base_url, "key": berth.owner.secret, "devbox": shared, "domain": "example.test"}
    with proxied(berth, shared) as origin:
        for door in (tunnel, {"origin": origin}):
            given = {**door, **how, "session": f"node-{typed}"}
            printed = node(node_client, given, f"{line}\nexit\n".encode() if typed else None).decode()
            assert "31 90\r\nsea green\r\n" in printed
            assert want in printed


def test_a_shell_is_left_and_found_again(berth, shared) -> None:
    with terminal(berth, shared, "stay") as client:
        client.send("cd /tmp; X=5; echo le''ft\n")
        until(client, b"left\r\n")
    assert session(berth.owner, shared, "stay").json()["created"] is False
    with terminal(berth, shared, "stay", replay="1") as client:
        assert b"left\r\n" in until(client, b"left\r\n")
        client.send("echo $PWD $X.\n")
        until(client, b"/tmp 5.\r\n")
        assert session(berth.colleague, shared, "stay").json()["attached"] is True
        assert refusal(terminal(berth, shared, "stay")) == 409
        with terminal(berth, shared, "stay", mode="view") as viewer:
            viewer.send("echo not by a vie''wer\n")
            client.send("echo by the wri''ter\n")
            assert b"by a viewer" not in until(viewer, b"by the writer\r\n")
        with terminal(berth, shared, "stay", takeover="1") as other:
            assert closed(client) == 4001
            other.send("sleep 100\n")
            time.sleep(0.5)
            assert control(berth.owner, shared, "stay", action="signal", signal="SIGINT").status_code == 200
            other.send("echo o''n\n")
            until(other, b"on\r\n")
            assert control(berth.owner, shared, "stay", action="close").json()["status"] == "closed"
            assert closed(other) == 4000
    assert control(berth.owner, shared, "stay", action="close").status_code == 404
    assert session(berth.owner, shared, "stay").json()["created"] is True


def test_large_output_is_exact_and_a_reader_that_stops_stops_the_shell(berth, shared) -> None:
    with terminal(berth, shared, "large") as client:
        client.send("stty -echo -onlcr; echo go''ing\n")
        until(client, b"going\n")
        client.send("seq 1 400000; echo the e''nd\n")
        time.sleep(2)  # nothing is read meanwhile
        seen = until(client, b"the end\n", 60)
        start = seen.index(b"1\n2\n3\n")
        assert seen[start:].split(b"the end")[0] == b"".join(b"%d\n" % n for n in range(1, 400001))
        big = b"x" * 3000
        client.send(b"head -c 300000 | sha256sum\n")
        for _ in range(100):
            client.send(big + b"\n" * 0)
            client.send(b"")
        control(berth.owner, shared, "large", action="close")


@pytest.mark.parametrize("name", ["a b", "x" * 257, "ä", "%2e%2e"])
def test_names_that_are_none(berth, shared, name: str) -> None:
    assert session(berth.owner, shared, name).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"action": "resize", "cols": 0, "rows": 1},
        {"action": "resize", "cols": 1001, "rows": 1},
        {"action": "resize", "cols": 10},
        {"action": "signal", "signal": "SIGNONE"},
        {"action": "signal"},
        {"action": "signal", "signal": "TERM"},
        {"action": "dance"},
        {},
        {"action": "close", "more": 1},
    ],
)
def test_control_that_is_wrong(berth, shared, body: dict[str, Any]) -> None:
    assert session(berth.owner, shared, "ctl", cols="junk", rows="7").json()["cols"] == 80
    answer = control(berth.owner, shared, "ctl", **body)
    assert answer.status_code == 400, answer.text


def test_nobody_elses(berth, shared) -> None:
    session(berth.owner, shared, "mine")
    nobody = "dbx_" + "0" * 26
    assert (
        session(berth.stranger, shared, "mine").status_code
        == session(berth.stranger, nobody, "mine").status_code
        == 404
    )
    assert control(berth.stranger, shared, "mine", action="close").status_code == 404
    assert berth.stranger.client.post(f"/v1/devboxes/{shared}/create_pty_tunnel").status_code == 404
    assert refusal(terminal(berth, shared, "mine", key=berth.stranger)) == 404
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{berth.base_url.replace('http', 'ws')}/pty/mine/attach?devbox_id={shared}", proxy=None)
    assert refused.value.response.status_code == 401
    assert berth.owner.client.get("/pty/mine").status_code == 400, "no devbox is named"


def test_shutdown_closes_it(berth) -> None:
    box = berth.owner.create(name="ends")
    with terminal(berth, box, "t") as client:
        client.send("echo u''p\n")
        until(client, b"up\r\n")
        berth.owner.shutdown(box)
        assert closed(client) in (4000, 1013)
    assert session(berth.owner, box, "t").status_code == 400
