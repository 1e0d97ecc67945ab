"""What an installation leaves on a machine while it is there: found by looking, not by remembering.

In charge of the search only, for ``make prove`` and the tests, which show that ``make uninstall`` leaves nothing.
Everything that belongs to an installation carries its state folder's path, its user's name or its install number, so
one that runs beside is never taken for it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from config.state import State
from hostd.config import HostConfig, from_dict, install_lock, installs_on_machine

#: Settings of the kernel that a VM host changes; compared before and after.
_SYSCTLS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/*/*",
    "net/ipv4/neigh/default/*",
    "net/netfilter/*max*",
    "kernel/*",
    "fs/*",
    "vm/*",
    "user/*",
)
_ALWAYS_MOVING = (
    "random/",
    "_nr",
    "-nr",
    "perf_event_max_sample_rate",
    "dentry",
    "inode",
    "ns_last_pid",
    "usermodehelper",
    "pty/",
    "tainted",
    "overflow",
    "stat_refresh",
)


@dataclass(frozen=True)
class Marks:
    """By what an installation's traces are known."""

    state: str
    user: str
    host: HostConfig | None

    @classmethod
    def of(cls, state: State) -> Marks:
        """Read while the installation is there; good for looking when it is gone."""
        path = state.path / "host" / "host.json"
        return cls(
            str(state.path), state.user_name(), from_dict(json.loads(path.read_text())) if path.exists() else None
        )


def find(marks: Marks) -> list[str]:
    """Every trace of it on this machine, in words; empty when there is none."""
    found = [f"process {line}" for line in _processes(marks)]
    found += [
        f"user {entry.pw_name}"
        for entry in pwd.getpwall()
        if entry.pw_name == marks.user or entry.pw_dir.startswith(f"{marks.state}/")
    ]
    found += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if marks.state in line]
    found += [f"socket {line}" for line in Path("/proc/net/unix").read_text().splitlines() if marks.state in line]
    if Path(marks.state).exists():
        found.append(f"folder {marks.state}")
    loops = _output("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE")
    found += [f"loop device {line}" for line in loops if marks.state in line]
    if marks.host is not None:
        found += _of_host(marks.host)
    return found


def _of_host(host: HostConfig) -> list[str]:
    numbered = _by_number(host)
    # Looked at last: whoever takes the number that was given back makes the lock first.
    owner = installs_on_machine().get(host.install, host.root)
    return ([f"folder {host.root}"] if os.path.lexists(host.root) else []) + (numbered if owner == host.root else [])


def _by_number(host: HostConfig) -> list[str]:
    """What only its install number tells from another installation's."""
    found = [f"folder {host.run}"] if os.path.lexists(host.run) else []
    if Path(install_lock(host.install)).exists():
        found.append(f"lock {install_lock(host.install)}")
    tables = _output("nft", "list", "tables")
    found += [f"firewall {line}" for line in tables if line.split()[-1:] == [host.firewall_table]]
    links = _output("ip", "-o", "link")
    found += [f"interface {line.split()[1]}" for line in links if line.split()[1].startswith(host.link_prefix)]
    found += [f"address {line}" for line in _output("ip", "-o", "addr") if f" {host.gateway}/" in line]
    network = str(host.subnet.network_address).rsplit(".", 1)[0]
    found += [f"route {line}" for line in _output("ip", "route") if line.startswith(f"{network}.")]
    groups = Path("/sys/fs/cgroup")
    found += [f"cgroup {path}" for path in (*groups.glob(host.cgroup), *groups.glob(f"*/{host.cgroup}"))]
    return found


def _processes(marks: Marks) -> list[str]:
    """Processes that name the folder in their command line, work in it, or hold a file in it open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            paths = [str(link.readlink()) for link in (folder / "cwd", *(folder / "fd").iterdir())]
        except OSError:
            continue
        if marks.state in command or any(path == marks.state or path.startswith(marks.state + "/") for path in paths):
            found.append(f"{folder.name} {command[:200]}")
    return found


def sysctls() -> dict[str, str]:
    """The kernel's settings that a VM host may touch, by their path below /proc/sys."""
    values = {}
    root = Path("/proc/sys")
    for pattern in _SYSCTLS:
        # An interface may go while its folder is listed, which `glob` bears and `Path.glob` does not.
        for name in glob.glob(pattern, root_dir=root):  # noqa: PTH207
            path = root / name
            if any(part in name for part in _ALWAYS_MOVING) or not path.is_file():
                continue
            with contextlib.suppress(OSError):
                values[name] = path.read_text()
    return values


def _output(*argv: str) -> list[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
