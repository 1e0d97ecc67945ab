"""SSH into a devbox with OpenSSH's own client: a command, beside the machine's own sshd; files through `scp`."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.creating import timed
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.ssh import loopback_ssh

MIB = 1024 * 1024
QUIET = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]


def ssh_exec_ms(target: Target) -> Iterator[Figure]:
    """`ssh … true` over a connection that is open, and with one of its own; the baseline is a loopback sshd."""
    count = 40 if target.quick else 80
    size = (32 if target.quick else 256) * MIB
    with tempfile.TemporaryDirectory() as name, target.boxes(1, cores=2) as (box,), loopback_ssh(target) as argv_of:
        folder = Path(name)
        ours, theirs = _into(target, box, folder), argv_of("")[:-1]
        for figure_name, shared in (("ssh_exec_ms", True), ("ssh_login_exec_ms", False)):
            base = _commands(theirs, folder / "theirs", count, shared=shared)
            took = _commands(ours, folder / "ours", count, shared=shared)
            yield figure(figure_name, "ms", took, statistics.median(base))
        source = folder / "source"
        with source.open("wb") as file:
            file.truncate(size)
        rate = size / 1e6
        for up in (True, False):
            one = [rate / _copy(theirs, source, str(folder / "copy"), up=up) for _ in range(2)]
            two = [rate / _copy(ours, source, "copy", up=up) for _ in range(2)]
            yield figure(f"ssh_scp_{'up' if up else 'down'}_mb_s", "MB/s", two, statistics.median(one))


def _into(target: Target, box: str, folder: Path) -> list[str]:
    """The argv for a devbox, but for the command."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(str(target.post(f"/v1/devboxes/{box}/create_ssh_key")["ssh_private_key"]))
    host, _, port = target.up.state.read_env()["BERTH_SSH_BIND"].rpartition(":")
    alone = ["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    return ["ssh", "-F", "none", *QUIET, *alone, "-i", str(key), "-p", port, f"{box}@{host}"]


def _commands(argv: list[str], control: Path, count: int, *, shared: bool) -> list[float]:
    """Milliseconds of each `true`."""
    with contextlib.ExitStack() as held:
        way: list[str] = []
        if shared:
            way = ["-S", str(control)]
            held.enter_context(_master(argv, control))
        command = [argv[0], *way, *argv[1:], "true"]
        run = lambda: subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)  # noqa: E731
        for _ in range(3):
            run()
        return [timed(run) for _ in range(count)]


@contextlib.contextmanager
def _master(argv: list[str], control: Path) -> Iterator[None]:
    master = subprocess.Popen([argv[0], "-M", "-N", "-S", str(control), *argv[1:]], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not control.exists():
            if master.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("ssh did not connect")
            time.sleep(0.02)
        yield
    finally:
        master.terminate()
        master.wait(10)


def _copy(argv: list[str], source: Path, there: str, *, up: bool) -> float:
    """Seconds of one file by `scp`."""
    options = ["-P" if one == "-p" else one for one in argv[1:-1]]
    remote = f"{argv[-1]}:{there}"
    paths = [str(source), remote] if up else [remote, str(source.with_name("back"))]
    return timed(lambda: subprocess.run(["scp", "-q", *options, *paths], check=True, timeout=120)) / 1000
