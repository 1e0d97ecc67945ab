"""A loopback `ssh` to compare with: what it takes to run a command on the machine itself over OpenSSH."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

from config.state import free_port
from tests.bench.installation import Target


@contextlib.contextmanager
def loopback_ssh(target: Target) -> Iterator[Callable[[str], list[str]]]:
    """An sshd with the installation's keys and settings; yields what makes the argv for a command, as root.

    One of its own, so that it can keep the shell from reading root's start-up files: what those do is no part of it.
    """
    home, port = target.up.state.path / "sshd", free_port()
    lines = (home / "sshd_config").read_text().splitlines()
    lines = [f"Port {port}" if line.startswith("Port ") else line for line in lines]
    config = home / "bench_config"
    config.write_text("\n".join(["SetEnv SHLVL=2", *lines]) + "\n")  # a shell that is not the first reads none
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    with open(target.up.state.logs / "bench-sshd.log", "ab") as log:
        sshd = subprocess.Popen([program, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if sshd.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the sshd to compare with did not start")
            time.sleep(0.05)
        quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        start = ["ssh", "-F", "none", *quiet, "-o", "BatchMode=yes", "-i", str(home / "admin"), "-p", str(port)]
        yield lambda command: [*start, "root@127.0.0.1", command]
    finally:
        sshd.terminate()
        try:
            sshd.wait(5)
        except subprocess.TimeoutExpired:
            sshd.kill()
            sshd.wait(5)
        config.unlink(missing_ok=True)
