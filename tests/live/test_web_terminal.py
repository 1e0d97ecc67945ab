"""The web terminal: in a real browser, and against those who are not let in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from config import sdk
from config.state import CHECKOUT

pytestmark = pytest.mark.live

SCREENSHOT = CHECKOUT / "build" / "web-terminal.png"


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox for all of them."""
    box = berth.owner.create(name="web terminal")
    yield box
    berth.owner.shutdown(box)


@pytest.fixture
def operator(berth):
    """Signed in to the admin: a client with the operator's cookies."""
    user, password = credentials(berth)
    with httpx.Client(base_url=berth.base_url, trust_env=False, follow_redirects=True) as client:
        form = client.get("/admin/login/").text
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form)
        assert token is not None
        fields = {"csrfmiddlewaretoken": token[1], "username": user, "password": password, "next": "/admin/"}
        answer = client.post("/admin/login/", data=fields)
        assert answer.status_code == 200
        assert answer.url.path == "/admin/"
        yield client


def credentials(berth) -> tuple[str, str]:
    told = dict(re.findall(r"^(user|password): *(\S+)", berth.state.admin_file.read_text(), re.M))
    return told["user"], told["password"]


def test_in_a_real_browser(berth, shared, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None or shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no chromium, node and npm on this machine")
    user, password = credentials(berth)
    driver = sdk.browser_driver()
    given = {
        "port": int(berth.base_url.rsplit(":", 1)[1]),
        "devbox": shared,
        "user": user,
        "password": password,
        "chromium": chromium,
        "profile": str(tmp_path / "profile"),
        "screenshot": str(SCREENSHOT),
    }
    script = driver / "web_terminal.mjs"
    shutil.copy(Path(__file__).with_name("web_terminal.mjs"), script)
    SCREENSHOT.unlink(missing_ok=True)
    argv = ["node", str(script), json.dumps(given)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SCREENSHOT.stat().st_size > 5000
    logs = berth.owner.client.get(f"/v1/devboxes/{shared}/logs").json()["logs"]
    assert any(entry.get("message") == f"the operator {user} opened a terminal" for entry in logs)


def page_of(box: str) -> str:
    return f"/admin/devboxes/devbox/{box}/terminal/"


def ticket_for(operator: httpx.Client, box: str) -> str:
    html = operator.get(page_of(box)).text
    csrf = re.search(r'data-csrf="([^"]+)"', html)
    assert csrf is not None
    answer = operator.post(page_of(box) + "ticket/", headers={"X-CSRFToken": csrf[1]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["ticket"])


def attach(berth, box: str, ticket: str | None, cookies: str, origin: str | None) -> Any:
    url = f"{berth.base_url.replace('http', 'ws')}{page_of(box)}web/attach?replay=1&takeover=1"
    return connect(
        url,
        subprotocols=[Subprotocol(ticket)] if ticket else None,
        additional_headers={"cookie": cookies} if cookies else None,
        origin=Origin(origin) if origin else None,
        proxy=None,
        max_size=None,
    )


def status_of(*how: Any) -> int:
    with pytest.raises(InvalidStatus) as refused, attach(*how):
        pass
    return int(refused.value.response.status_code)


def test_who_is_not_let_in(berth, shared, operator: httpx.Client) -> None:
    ours, cookies = berth.base_url, "; ".join(f"{name}={value}" for name, value in operator.cookies.items())
    other = berth.owner.create(name="another")
    with attach(berth, shared, ticket := ticket_for(operator, shared), cookies, ours) as client:
        assert client.subprotocol == ticket
        assert "replay" in json.loads(client.recv(timeout=20))
        client.send(b"echo i''n\n")
        seen = b""
        while b"in\r\n" not in seen:
            seen += bytes(client.recv(timeout=20))
    assert status_of(berth, shared, ticket, cookies, ours) == 401, "a ticket is good once"
    assert status_of(berth, shared, None, cookies, ours) == 401
    assert status_of(berth, shared, "made-up", cookies, ours) == 401
    assert status_of(berth, other, ticket_for(operator, shared), cookies, ours) == 401, "for one devbox"
    assert status_of(berth, shared, ticket_for(operator, shared), "", ours) == 401, "with the session it was made in"
    for origin in ("http://evil.example", f"http://8080-{'0' * 26}.tunnel.example.test", None):
        assert status_of(berth, shared, ticket_for(operator, shared), cookies, origin) == 403
    late = ticket_for(operator, shared)
    berth.rows("UPDATE pty_webticket SET expires_at = now() RETURNING 1")
    assert status_of(berth, shared, late, cookies, ours) == 401
    # A key of the API opens nothing here, a page of another site gets no ticket, a stranger sees the sign-in.
    bearer = {"authorization": f"Bearer {berth.owner.secret}"}
    assert httpx.get(ours + page_of(shared), headers=bearer, trust_env=False).status_code == 302
    assert operator.post(page_of(shared) + "ticket/").status_code == 403
    policy = operator.get(page_of(shared)).headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert operator.get(page_of("dbx_" + "0" * 26)).status_code == 404
    assert operator.get(page_of(shared), params={"session": '"><script>'}).status_code == 400
    berth.owner.shutdown(other)
    assert "open in this browser" not in operator.get(f"/admin/devboxes/devbox/{other}/change/").text


def test_a_page_that_works_nothing_off_stops_the_shell(berth, shared, operator: httpx.Client) -> None:
    cookies = "; ".join(f"{name}={value}" for name, value in operator.cookies.items())
    with attach(berth, shared, ticket_for(operator, shared), cookies, berth.base_url) as client:
        client.recv(timeout=20)
        client.send(b"stty -echo -onlcr; yes 0123456789abcdef | head -c 5000000; echo the e''nd\n")
        got = 0
        with pytest.raises(TimeoutError):
            while True:
                got += len(client.recv(timeout=3))
        assert 500_000 < got < 1_200_000
        seen = b""
        while b"the end\n" not in seen:
            client.send(json.dumps({"taken": got}))
            data = bytes(client.recv(timeout=20))
            got = len(data)
            seen = seen[-20:] + data
        client.send('{"resize": [70, 20]}')
        client.send(b"stty size\n")
        while b"20 70" not in seen:
            seen += bytes(client.recv(timeout=20))
        client.send("whatever")
        with pytest.raises(Exception, match="1003"):
            while True:
                client.recv(timeout=20)
