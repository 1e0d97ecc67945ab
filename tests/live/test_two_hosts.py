"""A second VM host joins a running installation, works beside the first, goes silent, comes back, and is taken out."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from config.state import CHECKOUT
from hostd.config import installs_on_machine
from tests.live.conftest import Berth, Key
from tests.ssh.loopback import Sshd

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

#: A host that was not heard for so long gets no placements, in seconds.
SILENT_AFTER = 10.0
NUMBERS = 900
COUNTING = f"for i in $(seq 1 {NUMBERS}); do echo $i; sleep 0.05; done"
#: The least that can be asked for, so that many fit.
SIZE = {
    "resource_size_request": "CUSTOM_SIZE", "custom_cpu_cores": 0.5, "custom_gb_memory": 1, "custom_disk_size": 2,
}  # fmt: skip
COUNTED = "".join(f"{n}\n" for n in range(1, NUMBERS + 1))

ENROL = """
import json, sys
from hosts.services import Wanted, enrol
given = json.loads(sys.stdin.read())
host = enrol(Wanted(**given), accept_key=lambda *_: True, progress=print)
print(json.dumps({"id": host.pk, "install": host.install, "image": host.image_id, "root": host.root}))
"""


class Second:
    """This machine once more, as a host of its own: another sshd, another install, another folder of images."""

    def __init__(self, berth: Berth, folder: Path) -> None:
        self.berth, self.folder = berth, folder
        self.sshd = Sshd(folder / "sshd", "root", homes=True, options="AllowStreamLocalForwarding local")
        self.cache = folder / "images"
        self.facts: dict[str, Any] = {}

    def enrol(self) -> str:
        """What enrolment said; the last line of it becomes ``facts``."""
        given = {
            "name": "second",
            "address": "127.0.0.1",
            "port": self.sshd.port,
            "admin_key": self.sshd.private,
            "pool_gb": 5,
            "root": str(self.folder / "host"),
            "extra": {"image_cache": str(self.cache)},
        }
        done = self._manage("shell", "--no-imports", "-c", ENROL, input=json.dumps(given))
        assert done.returncode == 0, done.stdout + done.stderr
        self.facts = json.loads(done.stdout.splitlines()[-1])
        return done.stdout

    def retire(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self._manage("retire_host", "second", *options)

    def _manage(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=CHECKOUT, env={**os.environ, "BERTH_STATE": str(self.berth.state.path)},
            capture_output=True, text=True, timeout=120, **more,
        )  # fmt: skip

    def set(self, columns: str) -> None:
        self.berth.rows(f"UPDATE hosts_host SET {columns} WHERE name = 'second' RETURNING id")


@pytest.fixture
def second(berth: Berth, live_folder: Path) -> Iterator[Second]:
    folder = Path(tempfile.mkdtemp(prefix="second-", dir=live_folder))  # others of this session had one of their own
    folder.chmod(0o755)
    made = Second(berth, folder)
    made.sshd.start()
    try:
        yield made
    finally:
        if berth.rows("SELECT id FROM hosts_host WHERE name = 'second' AND state <> 'retired'"):
            made.sshd.start() if made.sshd.process is None else None
            made.retire("--force")
        made.sshd.stop()


class Follower:
    """A client that streams a command's output, from offset to offset, and keeps what it was told."""

    def __init__(self, owner: Key, path: str) -> None:
        self.owner, self.path = owner, path
        self.text = ""
        self.errors: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        deadline = time.monotonic() + 150
        with httpx.Client(
            headers=dict(self.owner.client.headers), base_url=self.owner.base_url, timeout=60.0
        ) as client:
            while not self._once(client) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _once(self, client: httpx.Client) -> bool:
        event, failed = "", False
        where = {"offset": str(len(self.text.encode()))}
        with client.stream("GET", f"{self.path}/stream_stdout_updates", params=where) as answer:
            if answer.status_code != 200:
                self.errors.append(json.loads(answer.read()))
                return False
            for line in answer.iter_lines():
                if line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("data:") and event == "error":
                    self.errors.append(json.loads(line[5:]))
                    failed = True
                elif line.startswith("data:"):
                    self.text += json.loads(line[5:]).get("output", "")
                elif not line:
                    event = ""
        return not failed


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def host_of(berth: Berth, box: str) -> str:
    return str(berth.rows("SELECT h.name FROM devboxes_devbox d JOIN hosts_host h ON h.id = d.host_id"
                          " WHERE d.id = %s", box)[0][0])  # fmt: skip


def small(owner: Key) -> str:
    """A running devbox that takes little room."""
    return owner.create(launch_parameters=SIZE)


def begin(owner: Key, box: str, command: str) -> str:
    """The path of a command that was begun."""
    begun = owner.post(f"/v1/devboxes/{box}/execute_async", {"command": command})
    return f"/v1/devboxes/{box}/executions/{begun['execution_id']}"


def received_uuid(config: Path, image: str) -> str:
    argv = [sys.executable, "-m", "hostd", "image", "--config", str(config), "--id", image]
    said = json.loads(subprocess.run(argv, cwd=CHECKOUT, capture_output=True, timeout=30, check=True).stdout)
    return str(said["received_uuid"])


def test_a_second_host_from_enrolment_to_retirement(berth: Berth, second: Second) -> None:
    owner = berth.owner
    mine = small(owner)
    counting = begin(owner, mine, COUNTING)
    follower = Follower(owner, counting)

    # 1. It joins while the first serves, and has the very image the first has: sent, not built; a cut transfer, which
    #    an earlier try left behind, is gone on with.
    image = berth.rows("SELECT image_id FROM hosts_host WHERE name = 'local'")[0][0]
    here = berth.host_config()
    second.cache.mkdir()
    with open(f"{here.image_cache}/{image}.btrfs.zst", "rb") as stream:
        (second.cache / f"{image}.btrfs.zst.part").write_bytes(stream.read(5 << 20))
    said = second.enrol()
    assert f"sending the image {image}" in said and "MiB more" in said and "image_build" not in said, said
    assert second.facts["image"] == image and second.facts["install"] != here.install
    config = Path(second.facts["root"]) / "host.json"
    assert received_uuid(config, image) == received_uuid(Path(here.path), image) != ""

    # 2. Devboxes spread by room, keep off a cordoned host, and obey what may be promised.
    boxes = [small(owner) for _ in range(5)]
    places = [host_of(berth, box) for box in boxes]
    assert {"local", "second"} == set(places) and 2 <= places.count("second") <= 4, places
    second.set("cordoned = true")
    kept_off = [small(owner) for _ in range(2)]
    assert [host_of(berth, box) for box in kept_off] == ["local"] * 2
    second.set("cordoned = false, overcommit_memory = (used_memory_mb + 1500.0) / memory_mb")
    berth.rows("UPDATE hosts_host SET cordoned = true WHERE name = 'local' RETURNING id")
    asked = [str(owner.post("/v1/devboxes", {"launch_parameters": SIZE})["id"]) for _ in range(2)]
    until(
        lambda: sum(owner.get(f"/v1/devboxes/{box}")["status"] == "running" for box in asked) == 1, 30, "one has room"
    )
    time.sleep(1)
    assert sorted(owner.get(f"/v1/devboxes/{box}")["status"] for box in asked) == ["provisioning", "running"]
    second.set("overcommit_memory = NULL")
    for box in asked:
        owner.wait(box, "running", within=30)
    assert [host_of(berth, box) for box in asked] == ["second"] * 2
    berth.rows("UPDATE hosts_host SET cordoned = false WHERE name = 'local' RETURNING id")
    for box in (*kept_off, *asked):
        owner.shutdown(box)

    # One falls asleep there, and its disk follows to S3.
    sleeper = [box for box, place in zip(boxes, places, strict=True) if place == "second"][1]
    digest = owner.run(sleeper, "head -c 3000000 /dev/urandom > ~/data; sha256sum ~/data /etc/machine-id")
    owner.post(f"/v1/devboxes/{sleeper}/suspend")
    until(lambda: owner.get(f"/v1/devboxes/{sleeper}")["disk_stored_time_ms"], 60, "its disk is in S3")
    assert owner.get("/v1/devboxes/disk_snapshots")["snapshots"] == []

    # 3. It goes silent with work on it. Nobody is lied to, nothing hangs, and nothing new is placed there.
    theirs = next(box for box, place in zip(boxes, places, strict=True) if place == "second")
    there = begin(owner, theirs, COUNTING)
    watching = Follower(owner, there)
    until(lambda: "20\n" in watching.text, 20, "the stream has begun")
    gone_at = time.monotonic()
    second.sshd.stop()
    asked_at = time.monotonic()
    answer = owner.client.post(f"{there}/wait_for_status", json={"statuses": ["completed"], "timeout_seconds": 3})
    assert answer.status_code == 408 and 2.9 < time.monotonic() - asked_at < 6
    late = begin(owner, theirs, "echo it was only late")
    assert owner.get(f"/v1/devboxes/{theirs}")["status"] == "running"
    assert owner.get(there)["status"] == "running" and owner.get(late)["status"] in ("queued", "running")
    answer = owner.client.post(
        f"/v1/devboxes/{theirs}/execute", json={"command": "true", "command_id": "c", "optimistic_timeout": 2}
    )
    assert answer.status_code in (200, 408), answer.text
    time.sleep(max(0.0, SILENT_AFTER + 1 - (time.monotonic() - gone_at)))
    elsewhere = [small(owner) for _ in range(2)]
    assert [host_of(berth, box) for box in elsewhere] == ["local"] * 2
    # What sleeps there wakes on the other host, byte for byte, and is the same machine to all that runs in it.
    owner.post(f"/v1/devboxes/{sleeper}/resume")
    owner.wait(sleeper, "running", within=60)
    assert host_of(berth, sleeper) == "local"
    assert owner.run(sleeper, "sha256sum ~/data /etc/machine-id") == digest
    until(lambda: watching.errors, 30, "the stream says that it was interrupted")
    assert watching.errors[0]["code"] in (408, "408", "request_timeout", "timeout"), watching.errors
    assert owner.run(mine, "echo well") == ("well\n", "", 0)

    # 4. It comes back, and everything goes on from where it was: no line lost or twice, no exit wrong.
    second.sshd.start()
    back_at = time.monotonic()
    until(lambda: owner.get(late)["status"] == "completed", 40, "what was late has ended")
    assert owner.get(late)["stdout"] == "it was only late\n"
    assert owner.run(theirs, "echo here again") == ("here again\n", "", 0)
    assert time.monotonic() - back_at < 40
    for box in elsewhere:
        owner.shutdown(box)
    watching.thread.join(90)
    assert watching.text == COUNTED, watching.errors
    # The stream comes from the host itself; the row hears of the end once the host's events are heard again.
    until(lambda: owner.get(there)["status"] == "completed", 30, "its end is told")
    assert owner.get(there)["exit_status"] == 0
    until(lambda: host_of(berth, small(owner)) == "second", 30, "it gets placements again")

    # 5. It is not taken out with devboxes on it; without, nothing of it is left.
    refused = second.retire()
    assert refused.returncode != 0 and "cordoned, but has" in refused.stderr, refused.stdout + refused.stderr
    assert host_of(berth, small(owner)) == "local"
    for (box,) in berth.rows("SELECT id FROM devboxes_devbox WHERE completed_at IS NULL AND id <> %s", mine):
        owner.shutdown(box)
    nothing_there = "SELECT count(*) = 0 FROM devboxes_devbox d JOIN hosts_host h ON h.id = d.host_id WHERE h.name ="
    until(lambda: berth.rows(f"{nothing_there} 'second' AND d.completed_at IS NULL")[0][0], 30, "its devboxes are gone")
    taken_out = second.retire()
    assert taken_out.returncode == 0, taken_out.stdout + taken_out.stderr
    assert not Path(second.facts["root"]).exists() and second.facts["install"] not in installs_on_machine()
    with pytest.raises(KeyError):
        pwd.getpwnam(f"berth-link-{second.facts['install']}")

    # 6. The first noticed none of it.
    follower.thread.join(60)
    assert follower.text == COUNTED and follower.errors == []
    owner.shutdown(mine)
