"""The installation that is tormented, and what there is of it on this machine.

In charge of looking: processes, rows, objects, the things of boxes on the host. Not in charge of changing any of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psycopg
from botocore.config import Config

from config import servers, traces
from config.supervisor import start_time
from hostd.config import BOXES, UIDS_PER_BOX, HostConfig
from tests.live.conftest import Up, environment


@dataclasses.dataclass(frozen=True)
class Process:
    """A process by what cannot be another's."""

    pid: int
    started: int
    name: str

    @classmethod
    def of(cls, pid: int, name: str) -> Process | None:
        """None when there is no such process any more."""
        started = start_time(pid)
        return cls(pid, started, name) if started else None

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started


class Site:
    """One running installation with its own host."""

    def __init__(self, up: Up, base_url: str, key: str) -> None:
        self.state, self.base_url, self.key = up.state, base_url, key
        before = len(up.said())
        #: What the supervisor has printed since.
        self.said: Callable[[], str] = lambda: up.said()[before:]
        self.env = {**environment(up.state), **up.state.read_env(), **up.environment}
        host = traces.Marks.of(up.state).host
        assert host is not None
        self.host: HostConfig = host
        self.ssh_port = servers.sshd_port(up.state)
        self.ports = {"ssh": self.ssh_port}
        for name, variable in (("redis", "REDIS_URL"), ("s3", "S3_ENDPOINT_URL")):
            self.ports[name] = urlsplit(self.env[variable]).port or 0

    # -- processes -----------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, int]:
        """role or server -> pid, as the supervisor has them now; those that wait to be started again are absent."""
        facts = json.loads(self.state.supervisor_file.read_text())
        return {name: entry["pid"] for name, entry in facts["services"].items() if start_time(entry["pid"])}

    def hostd(self) -> int | None:
        try:
            pid = int(Path(self.host.root, "hostd.lock").read_text())
        except (OSError, ValueError):
            return None
        return pid if start_time(pid) else None

    def keepers(self) -> dict[str, int]:
        """slot -> pid of its keeper."""
        found = {}
        for path in sorted(Path(self.host.root, "keepers").glob("*.json")):
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if start_time(record["pid"]) == record["start"]:
                found[str(record["slot"])] = int(record["pid"])
        return found

    def spawners(self) -> list[int]:
        first = self.host.uid_base(0)
        mine = range(first, first + BOXES * UIDS_PER_BOX)
        return [pid for pid, name, uid in everybody() if name == "boxd" and uid in mine]

    def zygote(self) -> int | None:
        """The one whose listening socket is this installation's: known by the files it has open."""
        for pid, name, uid in everybody():
            if name == "zygote" and uid == 0 and any(self.host.root in path for path in _files(pid)):
                return pid
        return None

    def makers(self) -> list[int]:
        """Children of hostd that are root: its other ones are the boxes' first processes."""
        hostd = self.hostd()
        mine = set() if hostd is None else set(children(hostd))
        return [pid for pid, _, uid in everybody() if uid == 0 and pid in mine]

    def ssh_connections(self) -> list[tuple[int, str]]:
        """(pid, socket inode) of the processes of sshd that hold the server's end of a connection to our port."""
        inodes = {inode for port, _, inode, _ in tcp() if port == self.ssh_port}
        listener = self.roles().get("sshd")
        found = []
        for pid, name, _ in everybody():
            if name.startswith("sshd") and pid != listener:
                found += [(pid, inode) for inode in inodes & _sockets(pid)]
        return found

    # -- rows and objects ----------------------------------------------------------------------------------------------

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.env["DATABASE_URL"], autocommit=True, connect_timeout=5) as connection:
            return connection.execute(sql, parameters).fetchall()

    def objects(self) -> dict[str, int]:
        """key -> bytes of every object below `executions/` in the bucket."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.env["S3_ENDPOINT_URL"],
            aws_access_key_id=self.env["S3_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["S3_SECRET_ACCESS_KEY"],
            region_name=self.env["S3_REGION"],
            config=Config(s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=20),
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.env["S3_BUCKET"], Prefix="executions/")
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}

    # -- what boxes have on the host -----------------------------------------------------------------------------------

    def strangers(self) -> dict[str, set[str]]:
        """What the host has beyond the things of devboxes that are not over, by kind."""
        slots = {str(slot) for (slot,) in self.rows("SELECT slot FROM devboxes_devbox WHERE completed_at IS NULL")}
        expected = {f"b-{slot}" for slot in slots} | {f"k-{slot}" for slot in slots} | slots
        expected |= {f"{self.host.link_prefix}{slot.split('-')[0].removeprefix('s')}" for slot in slots}
        asleep = self.rows("SELECT id FROM devboxes_devbox WHERE step IN ('suspended', 'readmit', 'take_disk')")
        expected |= {str(devbox) for (devbox,) in asleep}
        hostd = self.hostd()
        if hostd is None:
            return {"hostd": {"it does not run"}}
        found = belongings(self.host, hostd)
        return {kind: names - expected for kind, names in found.items() if names - expected}


def belongings(host: HostConfig, hostd: int) -> dict[str, set[str]]:
    """What there is of boxes on the host, by kind."""
    groups = {path.name for path in Path("/sys/fs/cgroup").glob(f"*/{host.cgroup}/*") if path.is_dir()}
    links = {path.name for path in Path("/sys/class/net").glob(f"{host.link_prefix}*")}
    mounts = Path(f"/proc/{hostd}/mountinfo").read_text()
    return {
        "processes": processes(host),
        "mounts": set(re.findall(r"\bs\d+-[0-9a-f]{6}\b", mounts)),
        "cgroups": groups,
        "interfaces": links,
        "disks asleep": {path.name.partition(".")[0] for path in Path(host.asleep_disks).glob("*")},
        "disks": {path.name for path in Path(host.disks).iterdir()},
        "bundles": {path.name for path in Path(host.run, "b").iterdir()},
        "outputs": {path.name for path in Path(host.outputs).iterdir()},
    }


def processes(host: HostConfig) -> set[str]:
    """The boxes, by the name of their interface, whose users have processes on this machine: a process that is left
    has its uid, and with it a network and a mount namespace, even when it is in no cgroup of ours any more."""
    boxes, keepers = host.uid_base(0), host.keeper_uid(0)
    found = set()
    for _, _, uid in everybody():
        if boxes <= uid < boxes + BOXES * UIDS_PER_BOX:
            found.add(host.link((uid - boxes) // UIDS_PER_BOX))
        elif keepers <= uid < keepers + BOXES:
            found.add(host.link(uid - keepers))
    return found


def everybody() -> Iterator[tuple[int, str, int]]:
    """(pid, name, real uid) of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
        except OSError:
            continue
        if "\nState:\tZ" not in status:
            uid = int(status.split("\nUid:\t", 1)[1].split(None, 1)[0])
            yield int(folder.name), status.split("\n", 1)[0].removeprefix("Name:\t"), uid


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory_mb(pid: int) -> float:
    """Resident memory, 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)
    except (OSError, IndexError):
        return 0.0


def tcp() -> Iterator[tuple[int, int, str, str]]:
    """(local port, remote port, inode, state) of every IPv4 TCP socket; state 01 is established."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        yield int(fields[1][-4:], 16), int(fields[2][-4:], 16), fields[9], fields[3]


def _files(pid: int) -> list[str]:
    try:
        return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def _sockets(pid: int) -> set[str]:
    return {path[8:-1] for path in _files(pid) if path.startswith("socket:[")}
