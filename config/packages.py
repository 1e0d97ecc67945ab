"""Debian packages that this machine needs as control plane and as VM host: which are missing, and installing them.

In charge of saying what it installs before it does, and of leaving no service of an installed package started or
enabled: Berth runs private copies of the servers itself.  Not in charge of other VM hosts (their set-up does the same
there) nor of removing packages: ``make uninstall`` lists what was installed here and leaves them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from config.state import State, process_environment
from config.supervisor import Progress, StepFailed, last_words

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

#: How long one command of apt may take, in seconds, and how often its last line is shown meanwhile.
_APT_WITHIN, _APT_SHOWN = 900.0, 5.0

#: Files here make apt refuse to work: an installation was cut short and wants to be finished.
_DPKG_UNFINISHED = Path("/var/lib/dpkg/updates")

_UNIT_LINKS = Path("/etc/systemd/system")
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
    known = state.traces().get("packages", [])
    if installed := {*known, *wanted, *_installed_for_venv()}:
        state.record(packages=sorted(installed))
    if wanted:
        _install(state, say, {name: (CONTROL_PLANE | VM_HOST)[name] for name in wanted})
        if left := missing():
            why = f"apt-get installed everything, yet these are not there: {', '.join(left)}"
            raise StepFailed("packages", why, state.logs / "apt.log")


def ensure_one(state: State, say: Progress, program: str, what_for: str) -> None:
    """Install the package of a program that is not on this machine, naming it first.  Raises StepFailed."""
    if shutil.which(program) is None:
        state.record(packages=sorted({*state.traces().get("packages", []), program}))
        _install(state, say, {program: what_for})


def _install(state: State, say: Progress, wanted: Mapping[str, str]) -> None:
    if shutil.which("apt-get") is None:
        raise StepFailed("packages", f"this machine has no apt-get; install by hand: {', '.join(wanted)}", None)
    for name, what_for in wanted.items():
        say(f"packages     installing {name}: {what_for}")
    log = state.logs / "apt.log"
    links_before = _unit_links()
    # A machine that looks for upgrades by itself holds dpkg's lock now and then.
    options = ["--yes", "--quiet", "--no-install-recommends", "--option", "DPkg::Lock::Timeout=300"]
    with _services_off():
        if any(_DPKG_UNFINISHED.glob("[0-9]*")):
            _apt(["dpkg", "--configure", "-a"], log, say)
        _apt(["apt-get", "update", "--quiet"], log, say)
        _apt(["apt-get", "install", *options, *wanted], log, say)
    for link in _unit_links() - links_before:
        link.unlink(missing_ok=True)
    say(f"packages     {len(wanted)} installed; none of their services was started or enabled")


def _installed_for_venv() -> list[str]:
    """What the Makefile had to install before there was a virtual environment."""
    with contextlib.suppress(FileNotFoundError):
        return (Path(sys.prefix) / "debian-packages").read_text().split()
    return []


def _apt(command: Sequence[str], log: Path, say: Progress) -> None:
    """Run to its end, whatever is pressed meanwhile: a half-installed package is worse than a late answer.

    Raises StepFailed, or KeyboardInterrupt once the command has ended.
    """
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env=process_environment() | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        began, interrupted = time.monotonic(), False
        while True:
            try:
                status = process.wait(timeout=_APT_SHOWN)
                break
            except subprocess.TimeoutExpired:
                say(f"packages     {last_words(log)[:100]}")
                if time.monotonic() - began > _APT_WITHIN:
                    process.kill()
                    why = f"{' '.join(command[:2])} was not done within {_APT_WITHIN:g} s"
                    raise StepFailed("packages", why, log) from None
            except KeyboardInterrupt:
                interrupted = True
                say(f"packages     stopping when {' '.join(command[:2])} is done: half-installed packages help nobody")
    if interrupted:
        raise KeyboardInterrupt
    if status != 0:
        why = f"{' '.join(command)} ended with exit status {status}: {last_words(log)[:300]}"
        raise StepFailed("packages", why, log)


def _unit_links() -> set[Path]:
    """The links by which units of those packages start at boot.  Looked at directly: systemd need not be running."""
    return {
        link
        for link in (*_UNIT_LINKS.glob("*"), *_UNIT_LINKS.glob("*/*"))
        if link.is_symlink() and link.readlink().name in _UNITS
    }


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
