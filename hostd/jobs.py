"""What the maker processes do: the blocking work of hostd, one function per job.

In charge of putting boxes, keepers and the zygote together: the order in which a box gets its keeper and loses it.
Every job may be run twice, and after a kill in its middle. Not in charge of: how a box is made (`boxes`), what a keeper
does (`keeper`), who may ask (`verbs`).
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from hostd import asleep, boxes, bundle, keeper_spec, packets, receiving, sending, snapshots, zygotes
from hostd.boxes import Limits
from hostd.config import HostConfig
from hostd.keeper_spec import KeeperSpec, ZygoteError
from hostd.messages import Refused
from hostd.zygotes import zygote

_LINK_SECONDS = 5.0
_WARM_UP_SECONDS = 10.0
_CHECK_SECONDS = 20.0  # a shipped bundle must tell its version within this time


def runner(cfg: HostConfig) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """What a maker runs its jobs with."""

    def run(name: str, args: dict[str, Any]) -> dict[str, Any]:
        return JOBS[name](cfg, **args)

    return run


def make_disk(
    cfg: HostConfig, slot: str, n: int, image: str, disk_bytes: int, snapshot: str | None = None
) -> dict[str, Any]:
    source = snapshots.source(cfg, snapshot) if snapshot is not None else None
    boxes.make_disk(cfg, slot, n, image, disk_bytes, source)
    return {}


def boot(cfg: HostConfig, slot: str, n: int, limits: dict[str, int], hostname: str, box: str | None) -> dict[str, Any]:
    """Bring a box up and give it its keeper. Returns what hostd must remember of both."""
    began = time.monotonic()
    before = boxes.find_made(cfg, slot)
    made = boxes.make_box(cfg, slot, n, Limits(**limits), hostname)
    made_at = time.monotonic()
    spec = {"slot": slot, "uid": cfg.keeper_uid(n), "uid_base": cfg.uid_base(n), "init_pid": made.init_pid, "box": box}
    fresh = before is None or (before.init_pid, before.init_start) != (made.init_pid, made.init_start)
    pid, start = _give_keeper(cfg, slot, n, KeeperSpec(**spec), box_is_new=fresh)  # type: ignore[arg-type]
    return {
        "spec": spec,
        "pid": pid,
        "start": start,
        "init_pid": made.init_pid,
        "init_start": made.init_start,
        "address": made.address,
        "booted_at_ms": made.booted_at_ms,
        "phases": {
            **(made.phases if fresh else {}),
            "box_ms": round((made_at - began) * 1000, 1),
            "keeper_ms": round((time.monotonic() - made_at) * 1000, 1),
        },
    }


def warm_up(cfg: HostConfig, slot: str) -> dict[str, Any]:
    """Run an empty command in a box, so that the first real one finds the shell and its libraries in memory: each box's
    disk has a page cache of its own. Whether it succeeds does not matter."""
    argv = ["crun", f"--root={cfg.runtime_state}", "exec", "--user=1000:1000", slot, "/bin/bash", "-lc", "true"]
    try:
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WARM_UP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pass
    return {}


def set_limits(cfg: HostConfig, slot: str, limits: dict[str, int], hostname: str) -> dict[str, Any]:
    boxes.set_limits(cfg, slot, Limits(**limits), hostname)
    return {}


def stop(cfg: HostConfig, slot: str, n: int) -> dict[str, Any]:
    """End a box and its keeper; disk, outputs and name stay."""
    with zygote(cfg) as conn:
        keeper_spec.forget(conn, slot)
    boxes.stop_box(cfg, slot, n)
    return {}


def destroy(cfg: HostConfig, slot: str, n: int, keep_disk: bool, box: str | None) -> dict[str, Any]:
    # The keeper first: the zygote would start a successor of one that was only killed.
    with zygote(cfg) as conn:
        keeper_spec.forget(conn, slot)
    boxes.destroy_box(cfg, slot, n, keep_disk=keep_disk, box=box)
    return {}


def suspend(cfg: HostConfig, slot: str, n: int, box: str) -> dict[str, Any]:
    """End a box and its keeper; of all it had only the disk stays."""
    with zygote(cfg) as conn:
        keeper_spec.forget(conn, slot)
    boxes.suspend_box(cfg, slot, n, box)
    return {}


def resume(cfg: HostConfig, slot: str, box: str, disk_bytes: int) -> dict[str, Any]:
    """Give the slot the disk of the suspended devbox."""
    asleep.take_up(cfg, slot, box, disk_bytes)
    return {}


def drop_asleep(cfg: HostConfig, box: str, keep_disk: bool) -> dict[str, Any]:
    asleep.remove(cfg, box, keep=keep_disk)
    return {}


def restart_keeper(cfg: HostConfig, slot: str, n: int, spec: dict[str, Any]) -> dict[str, Any]:
    """The slot's keeper, or a successor when it is dead. When the zygote died with it, a new one starts from the
    journal: what ran is then told lost."""
    try:
        with zygote(cfg) as conn:
            pid, start = keeper_spec.restart_keeper(conn, slot)
    except ZygoteError as error:
        if error.code == "busy":
            raise Refused("busy", "the dead keeper's children are not gone yet") from None
        if error.code != "unknown_slot":
            raise
        pid, start = _give_keeper(cfg, slot, n, KeeperSpec(**spec), box_is_new=False)
    return {"pid": pid, "start": start}


def adopt_keeper(cfg: HostConfig, slot: str, n: int, spec: dict[str, Any], pid: int, start: int) -> dict[str, Any]:
    """Introduce a living keeper to a zygote that was started after its own died."""
    with zygote(cfg) as conn:
        known = keeper_spec.report(conn).get(slot)
        if known is not None and known.get("alive"):
            return {}
        fds = boxes.open_keeper_fds(cfg, slot, n)
        try:
            with keeper_spec.connect_keeper(cfg.run, slot, pid) as link:
                keeper_spec.adopt_keeper(conn, KeeperSpec(**spec), fds, pid, start, link)
                _close_when_read(link)
        finally:
            packets.close_all(fd for _, fd in fds)
    return {}


def start_zygote(cfg: HostConfig) -> dict[str, Any]:
    """After a zygote's death; a boot may have started the new one already."""
    running = bundle.running_path()
    zygotes.note(cfg, bundle.digest_of(running) if running else "")
    return {}


def thaw_all(cfg: HostConfig) -> dict[str, Any]:
    boxes.thaw_all(cfg)
    return {}


def take_snapshot(cfg: HostConfig, slot: str, snapshot: str, base_bytes: int) -> dict[str, Any]:
    return snapshots.take(cfg, slot, snapshot, base_bytes)


def thaw(cfg: HostConfig, slot: str) -> dict[str, Any]:
    snapshots.thaw(cfg, slot)
    return {}


def take_snapshot_asleep(cfg: HostConfig, box: str, snapshot: str, base_bytes: int) -> dict[str, Any]:
    return snapshots.take_asleep(cfg, box, snapshot, base_bytes)


def drop_snapshot(cfg: HostConfig, snapshot: str) -> dict[str, Any]:
    snapshots.drop(cfg, snapshot)
    return {}


def send_snapshot(cfg: HostConfig, snapshot: str, upload: str, part_bytes: int) -> dict[str, Any]:
    return sending.send(cfg, snapshot, upload, part_bytes)


def receive_snapshot(cfg: HostConfig, snapshot: str, **sealed: Any) -> dict[str, Any]:
    return receiving.receive(cfg, snapshot, **sealed)


def drop_kept_disks(cfg: HostConfig, older_than_seconds: float) -> dict[str, Any]:
    return {"dropped": boxes.drop_kept_disks(cfg, older_than_seconds)}


def check_bundle(cfg: HostConfig, path: str) -> dict[str, Any]:
    """Prove that a shipped bundle starts on this machine and understands its configuration. Raises Refused
    bad_request."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", path, "version", "--config", cfg.path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused("bad_request", f"the bundle did not start within {_CHECK_SECONDS:g} s") from None
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise Refused("bad_request", f"the bundle does not start here: {words[-300:]}")
    return {}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job
    for job in (
        make_disk,
        boot,
        warm_up,
        set_limits,
        stop,
        destroy,
        suspend,
        resume,
        drop_asleep,
        restart_keeper,
        adopt_keeper,
        start_zygote,
        thaw_all,
        take_snapshot,
        take_snapshot_asleep,
        thaw,
        drop_snapshot,
        send_snapshot,
        receive_snapshot,
        drop_kept_disks,
        check_bundle,
    )
}


def _close_when_read(link: socket.socket) -> None:
    """Wait for the keeper to have read all we sent. It drops a connection that takes nothing from it, unread or not."""
    link.shutdown(socket.SHUT_WR)
    link.settimeout(_LINK_SECONDS)
    while True:
        message, descriptors = packets.receive(link)
        packets.close_all(descriptors)
        if message is None:
            return


def _give_keeper(cfg: HostConfig, slot: str, n: int, spec: KeeperSpec, box_is_new: bool) -> tuple[int, int]:
    with zygote(cfg) as conn:
        if slot in keeper_spec.report(conn):
            if not box_is_new:
                return keeper_spec.restart_keeper(conn, slot)  # a boot that was cut short after its keeper was born
            keeper_spec.forget(conn, slot)  # the keeper of a box that ended
        fds = boxes.open_keeper_fds(cfg, slot, n)
        try:
            with keeper_spec.listening_socket(cfg.run, slot) as listener:
                return keeper_spec.start_keeper(conn, spec, [*fds, (keeper_spec.LISTEN, listener.fileno())])
        finally:
            packets.close_all(fd for _, fd in fds)
