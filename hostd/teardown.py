"""Stopping an install, and removing every trace of it from a machine.

In charge of: the order in which processes, mounts, kernel objects and files go. Works on any half state, may be
repeated. Not in charge of: packages, and the image cache, which other installs of the machine may share.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, Final

from hostd import bundles, cgroups, config, disks, firewall, namespaces, network, syscalls
from hostd.config import HostConfig
from hostd.messages import Refused

Say = Callable[[dict[str, Any]], None]

_PROCESS_SECONDS: Final = 10.0
_UNMOUNT_SECONDS: Final = 20.0
_LINK_SECONDS: Final = 2.0


def run(cfg: HostConfig, say: Say, *, keep_data: bool = False) -> int:
    """Tear the install down, telling each step as a JSON object; the last has ``done`` or ``error``. Returns 0 or 1.

    With ``keep_data`` the files stay, the pool among them: nothing runs, and the next start of hostd brings it back.
    """
    try:
        (stop if keep_data else tear_down)(cfg, say)
    except (Refused, cgroups.Stuck, OSError, subprocess.SubprocessError) as error:
        code = error.code if isinstance(error, Refused) else "internal"
        say({"error": {"code": code, "message": str(error)}})
        return 1
    say({"done": True, "image_cache": cfg.image_cache})
    return 0


def stop(cfg: HostConfig, say: Say) -> None:
    """All that runs or lives in the kernel, in order: who holds a thing goes before the thing.

    Raises Refused, Stuck, OSError.
    """
    ended = _end_processes(cfg)
    say({"step": "processes", "ended": ended})
    say({"step": "boxes", "ended": _end_boxes(cfg)})
    _unmount_pool(cfg)
    say({"step": "pool"})
    _remove_network(cfg)
    say({"step": "network"})
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(cfg.run)


def tear_down(cfg: HostConfig, say: Say) -> None:
    """Everything, the files last. Raises Refused, Stuck, OSError."""
    stop(cfg, say)
    if cfg.pool_device and disks.is_ours(cfg.pool_device):
        disks.run("wipefs", "--all", "--quiet", cfg.pool_device)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(cfg.root)
    config.release_install(cfg.install, cfg.root)
    say({"step": "files"})


def _end_processes(cfg: HostConfig) -> int:
    """Kill hostd, makers and zygote: whoever holds one of the install's sockets, or lives in its mount namespace."""
    ended = 0
    deadline = time.monotonic() + _PROCESS_SECONDS
    while True:
        left = _holders(cfg)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                ended += 1
        if not left:
            return ended
        if time.monotonic() > deadline:
            raise Refused("internal", f"processes {sorted(left)} are alive {_PROCESS_SECONDS:g} s after SIGKILL")
        time.sleep(0.02)


def _holders(cfg: HostConfig) -> set[int]:
    mine = {os.getpid(), os.getppid()}
    sockets = {f"socket:[{inode}]" for inode in _socket_inodes(cfg.run)}
    namespace = None
    with contextlib.suppress(OSError):
        if namespaces.is_pinned(cfg):
            namespace = os.stat(cfg.namespace_pin).st_ino
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in mine:
            continue
        with contextlib.suppress(OSError):
            if bundles.start_time(int(name)) is None:
                continue
            if namespace is not None and os.stat(f"/proc/{name}/ns/mnt").st_ino == namespace:
                found.add(int(name))
                continue
            if sockets and any(
                os.readlink(f"/proc/{name}/fd/{number}") in sockets for number in os.listdir(f"/proc/{name}/fd")
            ):
                found.add(int(name))
    return found


def _socket_inodes(folder: str) -> list[str]:
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        rows = [line.split() for line in file]
    return [row[6] for row in rows if len(row) > 7 and row[7].startswith(f"{folder}/")]


def _end_boxes(cfg: HostConfig) -> int:
    driver = cgroups.detect()
    names = driver.children(cfg.cgroup)
    for name in sorted(names, key=lambda text: text.startswith("b-")):  # keepers first: commands are their children
        driver.kill(f"{cfg.cgroup}/{name}")
    for name in names:
        driver.remove(f"{cfg.cgroup}/{name}")
    driver.remove(cfg.cgroup)
    return sum(name.startswith("b-") for name in names)


def _unmount_pool(cfg: HostConfig) -> None:
    """The mount namespace with all that was mounted in it, the pool's mount and its loop device; never its data."""
    namespaces.unpin(cfg)
    deadline = time.monotonic() + _UNMOUNT_SECONDS
    while os.path.ismount(cfg.pool):
        try:
            syscalls.unmount(cfg.pool, detach=False)
        except OSError as error:
            # Namespaces of processes that have just died let go of it some moments later.
            if error.errno != 16 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    disks.detach_loop(cfg.pool_file)


def _remove_network(cfg: HostConfig) -> None:
    deadline = time.monotonic() + _LINK_SECONDS
    while (left := network.links(cfg)) and time.monotonic() < deadline:
        time.sleep(0.02)  # they go with their namespaces, by themselves
    for link in left:
        number = re.fullmatch(rf"{cfg.link_prefix}(\d+)", link)
        if number:
            network.unwire(cfg, int(number[1]))
    if shutil.which("nft"):
        firewall.remove(cfg)
    network.machine_down(cfg)
