"""The published clients, each in an environment of its own, against the one port."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from config.sdk import PYTHON_VERSIONS
from config.state import CHECKOUT

pytestmark = pytest.mark.live

QUIET = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


@pytest.mark.parametrize("version", PYTHON_VERSIONS)
def test_the_python_sdk_passes_through_every_operation(berth, python_sdk, version: str) -> None:
    """The same proof as `make prove`; its words are the message when something is wrong."""
    argv = [str(python_sdk(version)), str(CHECKOUT / "config" / "proof.py"), berth.base_url, berth.owner.secret]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok") > 15


def test_the_typescript_sdk_makes_uses_and_ends_a_devbox(berth, typescript_sdk: Path) -> None:
    script = Path(__file__).with_name("sdk.mjs")
    (typescript_sdk / script.name).write_text(script.read_text())
    done = subprocess.run(
        ["node", script.name, berth.base_url, berth.owner.secret],
        cwd=typescript_sdk,
        capture_output=True,
        text=True,
        timeout=180,
        env=QUIET,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "running"
    assert told["sync"] == ["out\n", "err\n", 7]
    assert told["awaited"] == ["awaited\n", 0]
    assert told["streamed"] == "1\n2\n3\n"
    assert told["name"] == "renamed"
    assert told["listed"]
    assert told["read"] == "grüße\n"
    assert told["same"]
    assert told["after"] == "shutdown"
    assert told["unknown"] == 400


def test_http1_and_http2_without_a_handshake_share_the_port(berth) -> None:
    headers = {"authorization": f"Bearer {berth.owner.secret}"}
    for one, two in ((True, False), (False, True)):
        with httpx.Client(http1=one, http2=two, base_url=berth.base_url, headers=headers, trust_env=False) as client:
            answer = client.get("/v1/accounts/me")
            assert answer.status_code == 200, answer.text
            assert answer.http_version == ("HTTP/1.1" if one else "HTTP/2")
