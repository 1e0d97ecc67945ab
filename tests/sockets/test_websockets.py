"""WebSockets on the same port as HTTP: echo, refusals that say why, and a close that does not hang."""

from __future__ import annotations

import time

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect


def url(served, path="t/ws"):
    return f"ws://127.0.0.1:{served.port}/{path}"


def test_echo_keeps_text_bytes_and_subprotocol(served):
    with connect(url(served), subprotocols=["berth.one", "other"], max_size=None) as socket:
        assert socket.subprotocol == "berth.one"
        socket.send("grüße")
        assert socket.recv(timeout=5) == "grüße"
        blob = bytes(range(256)) * 4096
        socket.send(blob)
        assert socket.recv(timeout=5) == blob


def test_close_while_a_receive_is_pending(served):
    """The consumer closes from a task of its own while Channels awaits the next message."""
    before = time.monotonic()
    with connect(url(served)) as socket:
        socket.send("close from a task")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "as asked")
    assert time.monotonic() - before < 2
    assert served.seen("disconnected", 4001) == 4001


def test_a_client_that_leaves_is_noticed(served):
    with connect(url(served)) as socket:
        socket.send("x")
        socket.recv(timeout=5)
        socket.close(code=4222)
    assert served.seen("disconnected", 4222) == 4222


@pytest.mark.parametrize(("path", "status", "code"), [("t/ws?no", 403, b"forbidden"), ("t/nowhere", 404, b"not_found")])
def test_a_refusal_carries_its_status_and_body(served, path, status, code):
    with pytest.raises(InvalidStatus) as refused, connect(url(served, path)):
        pass
    assert refused.value.response.status_code == status
    assert code in (refused.value.response.body or b"")
