"""Debian packages that this machine needs as control plane and as VM host: which are missing, and installing them.

In charge of saying what it installs before it does, and of leaving no service of an installed package started or
enabled: Berth runs private copies of the servers itself.  Not in charge of other VM hosts (their set-up does the same
there) nor of removing packages: ``make uninstall`` lists what was installed here and leaves them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from config.state import State, process_environment
from config.supervisor import Progress, StepFailed

#: package -> what it is for.
CONTROL_PLANE = {
    "postgresql": "the database",
    "redis-server": "the broker of nudges",
    "openssh-server": "reaching this machine as VM host over SSH",
    "openssh-client": "making SSH keys",
}
VM_HOST = {
    "python3": "the host's daemon",
    "crun": "running devboxes",
    "btrfs-progs": "the pool of disks",
    "nftables": "the boxes' firewall",
    "mmdebstrap": "building the base image",
    "golang-github-containers-common": "the seccomp profile that ours is derived from",
    "catatonit": "the first process in a box",
    "zstd": "packing images and snapshots",
    "iproute2": "looking at the boxes' network",
}

#: Units that those packages bring, start and enable; ours are private ones, so these stay off when we install the
#: package.
_UNITS = ("postgresql.service", "redis-server.service", "ssh.service", "nftables.service")

_POLICY = Path("/usr/sbin/policy-rc.d")
_NO_CLUSTER = Path("/etc/postgresql-common/createcluster.d/berth.conf")


def missing() -> list[str]:
    """The packages of ours that are not installed, in the order of the tables above."""
    wanted = [*CONTROL_PLANE, *VM_HOST]
    answer = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *wanted],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    installed = {line.split()[0] for line in answer.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def ensure(state: State, say: Progress) -> None:
    """Install what is missing, naming it first.  Raises StepFailed with the log of apt."""
    wanted = missing()
    if not wanted:
        return
    if shutil.which("apt-get") is None:
        raise StepFailed("packages", f"this machine has no apt-get; install by hand: {', '.join(wanted)}", None)
    for name in wanted:
        say(f"packages     installing {name}: {(CONTROL_PLANE | VM_HOST)[name]}")
    state.record(packages=sorted({*state.traces().get("packages", []), *wanted}))
    log = state.logs / "apt.log"
    enabled_before = _enabled()
    with _services_off(), open(log, "ab") as out:
        for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *wanted]):
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=900, check=False,
                    env=process_environment() | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise StepFailed("packages", f"{' '.join(command[:2])} was not done within 900 s", log) from None
            if done.returncode != 0:
                raise StepFailed("packages", f"{' '.join(command)} ended with exit status {done.returncode}", log)
    for unit in sorted(_enabled() - enabled_before):
        subprocess.run(["systemctl", "disable", "--quiet", unit], capture_output=True, timeout=60, check=False)
    if left := missing():
        raise StepFailed("packages", f"apt-get installed everything, yet these are not there: {', '.join(left)}", log)


def _enabled() -> set[str]:
    """Which of the packages' units start at boot.  Read from the links, so that it works where systemd does not run."""
    wants = Path("/etc/systemd/system")
    return {unit for unit in _UNITS if any(wants.glob(f"*.wants/{unit}")) or any(wants.glob(f"*.requires/{unit}"))}


@contextlib.contextmanager
def _services_off() -> Iterator[None]:
    """Have Debian's maintainer scripts start nothing, and PostgreSQL's make no cluster of its own, for the length of
    a ``with``."""
    saved = _POLICY.with_name("policy-rc.d.before-berth")
    if _POLICY.exists():
        _POLICY.rename(saved)
    made_folder = not _NO_CLUSTER.parent.parent.exists()
    _NO_CLUSTER.parent.mkdir(parents=True, exist_ok=True)
    try:
        _POLICY.write_text(
            "#!/bin/sh\n# Berth is installing packages whose services it does not want started.\nexit 101\n"
        )
        _POLICY.chmod(0o755)
        _NO_CLUSTER.write_text("create_main_cluster = false\n")
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
        _NO_CLUSTER.unlink(missing_ok=True)
        if made_folder:
            with contextlib.suppress(OSError):  # the package's own files are in it by now
                _NO_CLUSTER.parent.rmdir()
                _NO_CLUSTER.parent.parent.rmdir()
        if saved.exists():
            saved.rename(_POLICY)


def main() -> None:
    """``python -m config.packages``: install what is missing, for a machine that only runs the tests."""
    state = State.from_environment()
    say = Progress()
    if not missing():
        say("packages     all there")
        return
    state.create()
    ensure(state, say)


if __name__ == "__main__":
    main()
