"""Enrolling this machine over a real sshd, running a box on it, upgrading and losing hostd, and retiring it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

import hostd
from api.ids import new_id
from api.threads import use_pool
from hostd.bundle import build
from hosts import links, shipping, ssh
from hosts.client import AsyncHostClient, HostClient, HostRefused, outputs
from hosts.models import Host
from hosts.services import EnrolmentFailed, Wanted, enrol, retire
from hosts.upkeep import keep_up
from tests.hostd.trial import why_not
from tests.ssh.loopback import Sshd, started

pytestmark = [pytest.mark.live, pytest.mark.timeout(600), pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
CLUSTER = str(uuid.uuid4())
MIB = 1 << 20


@pytest.fixture
def admin_sshd(tmp_path: pathlib.Path) -> Iterator[Sshd]:
    with started(Sshd(tmp_path / "sshd", "root", homes=True, options="AllowStreamLocalForwarding local")) as sshd:
        yield sshd


def wanted(sshd: Sshd, name: str = "local", **more) -> Wanted:
    install = os.environ.get("BERTH_TEST_INSTALL")
    fields: dict[str, Any] = {
        "name": name,
        "address": "127.0.0.1",
        "port": sshd.port,
        "admin_user": sshd.user,
        "admin_key": sshd.private,
        "pool_gb": 4,
        "install": int(install) if install else None,
    }
    return Wanted(**(fields | more))


@pytest.fixture
def host(admin_sshd: Sshd, transactional_db) -> Iterator[Host]:
    said: list[str] = []
    try:
        host = enrol(
            wanted(admin_sshd),
            accept_key=lambda key, _: key == admin_sshd.host_key,
            progress=said.append,
        )
        assert not any("warning: the link" in line for line in said), said
        yield host
    finally:
        if Host.objects.exclude(state="retired").exists():
            retire("local", force=True)


@pytest.fixture(autouse=True)
def cluster(settings: Any) -> None:
    """Ours for this run; nothing of another is touched."""
    settings.BERTH = dataclasses.replace(settings.BERTH, cluster=CLUSTER)


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    """Threads that the loop's clients used keep a connection each to the test database: end them."""
    yield
    pool = use_pool(None)
    if pool is not None:
        pool.submit(lambda: connection.close()).result()
        pool.shutdown()


def lock_holder(host: Host) -> int:
    return int(pathlib.Path(host.root, "hostd.lock").read_text())


def body(command: str, **more) -> Any:
    user = {"name": "user", "uid": 1000, "gid": 1000, "home": "/home/user"}
    return {"command": command, "env": {}, "cwd": "/home/user", "user": user, "stdin": "none", "login": True} | more


def make_box(client: HostClient, host: Host) -> tuple[str, int]:
    box, fence = new_id("dbx"), time.time_ns() // 1000
    disk = 2048 * MIB
    client.prepare_disk(box=box, fence=fence, image=host.image_id, disk_bytes=disk)
    client.boot(box=box, fence=fence, cpu_millis=1000, memory_bytes=512 * MIB, pids=512, disk_bytes=disk, hostname="b")
    return box, fence


def test_a_host_is_enrolled_used_revived_upgraded_and_retired(
    host: Host, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.state == "ready" and host.seen_at and host.cpu_millis and host.memory_mb and host.disk_mb
    assert host.digest == shipping.bundle().digest and host.image_id

    # 1. Commands, their output and a followed stream, from threads and from the loop.
    client = HostClient(host.pk)
    box, fence = make_box(client, host)
    state = client.spawn(box=box, id=new_id("exe"), fence=fence, body=body("id -un; echo no >&2; exit 3"), hold_ms=3000)
    assert (state["exit"], outputs(state)) == (3, (b"user\n", b"no\n"))
    running = new_id("exe")
    client.spawn(box=box, id=running, fence=fence, body=body("for i in $(seq 1 60); do echo $i; sleep 0.1; done"))

    # 2. hostd is killed in the middle of it: the next call starts it again, and the stream goes on to its end.
    async def follow() -> tuple[bytes, Any]:
        async with AsyncHostClient(host.pk).follow(box=box, id=running, stream="stdout") as stream:
            got = b"".join([piece async for piece in stream])
            return got, stream.trailer

    def hello() -> str:
        try:
            return client.hello()["host"]
        finally:
            connection.close()

    async def follow_across_a_kill() -> tuple[bytes, Any]:
        following = asyncio.create_task(follow())
        await asyncio.sleep(0.5)
        old = lock_holder(host)
        os.kill(old, signal.SIGKILL)
        assert await asyncio.to_thread(hello) == host.pk
        assert lock_holder(host) != old
        return await following

    got, trailer = asyncio.run(follow_across_a_kill())
    assert got == b"".join(b"%d\n" % number for number in range(1, 61)) and trailer["complete"] and trailer["exit"] == 0

    # 3. Another hostd takes its place in the middle of the next one, and nothing of it is lost either.
    newer = tmp_path / "newer"
    shutil.copytree(pathlib.Path(hostd.__file__).parent, newer, ignore=shutil.ignore_patterns("__pycache__"))
    (newer / "procs.py").write_text((newer / "procs.py").read_text() + "\n# a later release\n")
    later = build(str(newer))
    monkeypatch.setattr(shipping, "bundle", lambda: later)
    assert later.digest != host.digest
    running = new_id("exe")
    client.spawn(box=box, id=running, fence=fence, body=body("for i in $(seq 1 60); do echo $i; sleep 0.1; done"))

    def upgrade() -> str:
        try:
            assert keep_up(client).upgraded
            deadline = time.monotonic() + 20
            while (digest := client.hello()["digest"]) != later.digest:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            return digest
        finally:
            connection.close()

    async def follow_across_an_upgrade() -> tuple[bytes, Any]:
        following = asyncio.create_task(follow())
        await asyncio.sleep(0.5)
        await asyncio.to_thread(upgrade)
        return await following

    got, trailer = asyncio.run(follow_across_an_upgrade())
    assert got.endswith(b"59\n60\n") and got.count(b"\n") == 60 and trailer["complete"] and trailer["exit"] == 0

    # 4. The exits wait for whoever watches, and are gone once acknowledged.
    with client.watch() as watching:
        seen: dict[str, Any] = {}
        while len(seen) < 3:
            for event in watching.events(5):
                if event["event"] == "exit":
                    seen[event["id"]] = event
        assert seen[running]["exit"] == 0
        watching.ack([(box, id) for id in seen])
    assert client.read(box=box, id=running, stream="stdout", offset=0, limit=1000, last_lines=2).data == b"59\n60\n"

    # 5. With devboxes promised there it is not retired; without, nothing of it is left.
    Host.objects.filter(pk=host.pk).update(used_memory_mb=512)
    with pytest.raises(EnrolmentFailed, match="cordoned"):
        retire("local")
    Host.objects.filter(pk=host.pk).update(used_memory_mb=0)
    retire("local")
    assert not pathlib.Path(host.root).exists() and not pathlib.Path(host.run_dir).exists()
    with pytest.raises(KeyError):
        pwd.getpwnam(host.link_user)
    assert (
        f"berth_{host.install}" not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    )


def test_the_link_cannot_be_used_for_anything_else(host: Host, admin_sshd: Sshd) -> None:
    import paramiko

    transport = ssh.dial(links.where_is(host.pk).login)
    with pytest.raises(ssh.SocketRefused):
        transport.open_stream("/run/berth-99/hostd.sock", time.monotonic() + 5)
    channel = transport.open_session(timeout=5)
    channel.exec_command("id")
    assert b"uid=" not in channel.recv(1000)  # nologin says its line, and that is all
    with pytest.raises(paramiko.ChannelException):
        transport.open_channel("direct-tcpip", ("127.0.0.1", admin_sshd.port), ("127.0.0.1", 1), timeout=5)
    with pytest.raises(paramiko.SSHException):
        transport.request_port_forward("127.0.0.1", 0)
    transport.close()


def test_a_host_that_lets_its_link_do_more_is_not_accepted(admin_sshd: Sshd, transactional_db, monkeypatch) -> None:
    from hosts import services

    monkeypatch.setattr(services, "_authorized", lambda private, path: f"{ssh.public_key(private)} berth\n")
    try:
        with pytest.raises(EnrolmentFailed, match=r"not confined.*another socket"):
            enrol(wanted(admin_sshd), accept_key=lambda *_: True)
        row = Host.objects.get(name="local")
        assert row.state == "failed" and "not confined" in str(row.error_detail)
        monkeypatch.undo()
        assert enrol(wanted(admin_sshd), accept_key=lambda *_: True).pk == row.pk  # goes on with it
        with pytest.raises(EnrolmentFailed, match="already"):
            enrol(wanted(admin_sshd), accept_key=lambda *_: True)
        with pytest.raises(HostRefused):
            HostClient(row.pk).state(box=new_id("dbx"), id=new_id("exe"))
    finally:
        retire("local", force=True)


def test_an_enrolment_that_ended_early_is_retired_without_a_trace(
    admin_sshd: Sshd, transactional_db, monkeypatch
) -> None:
    from hosts import services

    monkeypatch.setattr(services, "_LINK_USER", "exit 9")
    with pytest.raises(EnrolmentFailed, match="ended with 9"):
        enrol(wanted(admin_sshd), accept_key=lambda *_: True)
    row = Host.objects.get(name="local")
    assert row.state == "failed" and pathlib.Path(row.root).is_dir()
    retire("local")
    assert not pathlib.Path(row.root).exists()
    assert not pathlib.Path(f"/run/lock/berth-install-{row.install}.lock").exists()


def test_what_may_fail_before_anything_is_made(admin_sshd: Sshd, transactional_db) -> None:
    with pytest.raises(EnrolmentFailed, match="not accepted"):
        enrol(wanted(admin_sshd), accept_key=lambda *_: False)
    with pytest.raises(EnrolmentFailed, match="refuses our key"):
        enrol(wanted(admin_sshd, admin_key=ssh.new_key("x")[0]), accept_key=lambda *_: True)
    with pytest.raises(EnrolmentFailed, match="refused"):
        enrol(wanted(admin_sshd, port=1), accept_key=lambda *_: True)
    assert not Host.objects.exists()


@pytest.fixture
def sudoer() -> Iterator[str]:
    """A user who may become root by sudo without a password."""
    if not shutil.which("sudo"):
        pytest.skip("sudo is not installed")
    name = f"berth-t{os.getpid() % 100_000}"
    rule = pathlib.Path("/etc/sudoers.d", name)
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", "--password", "*", name], check=True)
    try:
        rule.write_text(f"{name} ALL=(ALL) NOPASSWD: ALL\n")
        rule.chmod(0o440)
        yield name
    finally:
        rule.unlink(missing_ok=True)
        subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)


def test_a_user_with_sudo_is_enough(tmp_path: pathlib.Path, sudoer: str, transactional_db) -> None:
    options = "AllowStreamLocalForwarding local"
    with started(Sshd(tmp_path / "sshd", sudoer, homes=True, options=options)) as sshd:
        for folder in (tmp_path, *list(tmp_path.parents)[:2]):
            folder.chmod(0o755)  # sshd reads the keys as that user
        try:
            assert enrol(wanted(sshd), accept_key=lambda *_: True).state == "ready"
        finally:
            retire("local", force=True)
        pathlib.Path("/etc/sudoers.d", sudoer).unlink()
        with pytest.raises(EnrolmentFailed, match="may not become root"):
            enrol(wanted(sshd, name="other"), accept_key=lambda *_: True)
