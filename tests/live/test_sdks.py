"""The published clients, each in an environment of its own, against the one port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from config import first
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


@pytest.mark.parametrize("name", ["Python", "TypeScript", "curl"])
def test_the_lines_that_make_up_prints_work_as_they_stand(berth, python_sdk, typescript_sdk: Path, name: str) -> None:
    """In a shell, but for the lines that install the client: it is here already."""
    if shutil.which(name) is None and name == "curl":
        pytest.skip("no curl on this machine")
    lines = first.lines_to_paste(berth.state, berth.base_url, berth.owner.secret, berth.env["BERTH_SSH_BIND"])
    text = next(text for title, text in lines.items() if title.startswith(name))
    if name != "curl":
        text = text.split("\n", 1)[1].replace("~/berth-sdk/bin/python", str(python_sdk(PYTHON_VERSIONS[0])))
    done = subprocess.run(
        ["bash", "-c", text], cwd=typescript_sdk, capture_output=True, text=True, timeout=60, env=QUIET
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stdout + done.stderr
    if name == "curl":
        assert json.loads(done.stdout)["name"] == "mine"
        berth.owner.shutdown(json.loads(done.stdout)["id"])
    else:
        assert done.stdout.startswith("Linux dbx-"), done.stdout


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
