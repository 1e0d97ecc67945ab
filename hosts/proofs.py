"""What a new host must show before it is accepted: a link that reaches one socket only, and a box that really runs.

In charge of trying and of saying what was wrong; changes no row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from api.ids import new_id
from hostd.messages import RETRYABLE
from hosts.client import HostClient, HostRefused, HostUnreachable
from hosts.shipping import PYTHON
from hosts.ssh import Admin, Login
from hosts.ssh.confinement import liberties

BOX_SECONDS: Final = 90.0
_MIB: Final = 1024 * 1024

T = TypeVar("T")


class ProofFailed(Exception):
    """The host is not fit to be accepted; the text says what it did or did not do."""


# Listens where the link must not get to, says where, and ends with its input.
_DECOYS = """
import json, os, socket, sys, tempfile
folder = tempfile.mkdtemp(prefix="berth-decoy-")
os.chmod(folder, 0o777)
path = os.path.join(folder, "other.sock")
remote = os.path.join(folder, "remote.sock")
unix = socket.socket(socket.AF_UNIX); unix.bind(path); os.chmod(path, 0o777); unix.listen(5)
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen(5)
print(json.dumps({"path": path, "remote": remote, "port": tcp.getsockname()[1]}), flush=True)
try:
    sys.stdin.read()
finally:
    for one in (path, remote):
        try: os.unlink(one)
        except FileNotFoundError: pass
    os.rmdir(folder)
"""


def prove_confinement(admin: Admin, link: Login) -> list[str]:
    """Raise ProofFailed when the link can do more than it must; returns warnings. SshError when it cannot log in."""
    with admin.beside([PYTHON, "-I", "-c", _DECOYS], timeout=15) as line:
        decoys = json.loads(line)
        wrong, lax = liberties(link, decoys["path"], decoys["port"], decoys["remote"])
    if wrong:
        raise ProofFailed("the link's key is not confined: " + "; ".join(wrong))
    return [f"the link's key: {text}" for text in lax]


def prove_box(client: HostClient, image: str) -> float:
    """Make a box, run `true` in it, destroy it. Returns how long it took, in seconds. Raises ProofFailed."""
    box, work = new_id("dbx"), new_id("set")
    fence = time.time_ns() // 1000
    deadline = time.monotonic() + BOX_SECONDS
    started_at = time.monotonic()
    disk = 2048 * _MIB
    body: dict[str, Any] = {
        "command": "true",
        "env": {},
        "cwd": "/",
        "user": {"name": "root", "uid": 0, "gid": 0, "home": "/root"},
        "stdin": "none",
        "login": True,
    }
    try:
        _insist(
            lambda: client.prepare_disk(box=box, fence=fence, image=image, disk_bytes=disk), deadline, "prepare_disk"
        )
        _insist(
            lambda: client.boot(
                box=box,
                fence=fence,
                cpu_millis=1000,
                memory_bytes=512 * _MIB,
                pids=512,
                disk_bytes=disk,
                hostname="proof",
            ),
            deadline,
            "boot",
        )
        state = _insist(
            lambda: client.spawn(box=box, id=work, fence=fence, body=body, hold_ms=2000),  # type: ignore[arg-type]
            deadline,
            "spawn",
        )
        while state["state"] != "exited":
            if time.monotonic() > deadline:
                raise ProofFailed(f"`true` did not end in a box within {BOX_SECONDS:.0f} s")
            time.sleep(0.1)
            state = _insist(lambda: client.state(box=box, id=work), deadline, "state")
        if state.get("exit") != 0:
            raise ProofFailed(f"`true` ended with {state.get('exit')} in a box: {state.get('reason')}")
        took = time.monotonic() - started_at
    finally:
        left = _destroyed(client, box, fence)
    if left is not None:
        raise left
    if any(one["box"] == box for one in _insist(client.report, deadline, "report")["boxes"]):
        raise ProofFailed("the box is still there after it was destroyed")
    return took


def _destroyed(client: HostClient, box: str, fence: int) -> ProofFailed | None:
    try:
        _insist(lambda: client.destroy(box=box, fence=fence), time.monotonic() + 30, "destroy")
    except ProofFailed as error:
        return error  # not raised over what may have failed before
    return None


def _insist(call: Callable[[], T], deadline: float, verb: str) -> T:
    """Ask until the deadline (every verb may be sent twice); only an answer that says no is believed at once."""
    while True:
        try:
            return call()
        except HostRefused as error:
            if error.code not in RETRYABLE or time.monotonic() > deadline:
                raise ProofFailed(f"{verb}: {error}") from error
        except HostUnreachable as error:
            if time.monotonic() > deadline:
                raise ProofFailed(f"{verb}: {error}") from error
        time.sleep(0.3)
