"""A real sshd on a free loopback port, confined as a host's is, and a stub of hostd behind it on a Unix socket.

In charge of starting both below a temporary folder and of ending exactly what it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import pwd
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from hosts.ssh import Login, new_key, scan_host_key
from hosts.ssh.errors import SshError

SSHD = "/usr/sbin/sshd"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    """One sshd. `options`: lines of sshd_config; `key_options`: what stands before the key in authorized_keys."""

    def __init__(
        self, folder: pathlib.Path, user: str, *, options: str = "", key_options: str = "", homes: bool = False
    ) -> None:
        self.folder = folder
        self.user = user
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.private, public = new_key("test")
        self.new_host_key()
        (folder / "authorized_keys").write_text(f"{key_options} {public}\n".lstrip())
        (folder / "authorized_keys").chmod(0o644)
        # With `homes`, users have keys of their own too, as on a host; the admin's stays in our folder.
        if homes:
            (folder / "admin").mkdir(exist_ok=True)
            (folder / "admin" / user).write_text((folder / "authorized_keys").read_text())
        keys = f".ssh/authorized_keys {folder}/admin/%u" if homes else f"{folder}/authorized_keys"
        (folder / "config").write_text(
            f"""
Port {self.port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {keys}
StrictModes no
SetEnv HOME={folder}
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthenticationMethods publickey
UseDNS no
PermitRootLogin prohibit-password
MaxStartups 200
{options}
"""
        )

    def new_host_key(self) -> None:
        private, public = new_key("host")
        (self.folder / "host_key").write_text(private)
        (self.folder / "host_key").chmod(0o600)
        self.host_key = " ".join(public.split()[:2])

    def start(self) -> None:
        self._run_folder = pathlib.Path("/run/sshd")
        if os.getuid() == 0:
            self._run_folder.mkdir(mode=0o755, exist_ok=True)  # sshd refuses to start without it
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.folder / "config")], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                scan_host_key("127.0.0.1", self.port, 2)
                return
            except SshError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError((self.folder / "log").read_text()) from None
                time.sleep(0.05)

    def sessions(self) -> list[int]:
        """Pids of the processes that serve logged-in connections."""
        assert self.process is not None
        return _descendants(self.process.pid)[1:]

    def signal_all(self, number: int) -> None:
        """To the listener and every session process."""
        if self.process is None:
            return
        for pid in reversed(_descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal_all(signal.SIGCONT)
            self.signal_all(signal.SIGKILL)
            self.process.wait(5)
            self.process = None

    def login(self, **changes: Any) -> Login:
        fields: dict[str, Any] = {
            "address": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "private_key": self.private,
            "host_key": self.host_key,
        }
        return Login(**(fields | changes))


def confined(socket_path: pathlib.Path | str) -> dict[str, Any]:
    """What a host's sshd and authorized_keys say about our login."""
    permit = f"[{socket_path}]:*"
    return {
        "key_options": f'restrict,port-forwarding,permitopen="{permit}"',
        "options": f"""MaxSessions 0
AllowTcpForwarding local
AllowStreamLocalForwarding local
PermitListen none
PermitOpen {permit}
X11Forwarding no
AllowAgentForwarding no
PermitTunnel no
PermitTTY no
PermitUserRC no""",
    }


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
            for task in pathlib.Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


class StubHostd:
    """Answers lines as hostd does, in a thread with a loop of its own.

    Verbs of its own: `echo` (raw both ways), `source` (n raw bytes), `framed` (n bytes in frames and a trailer),
    `cut` (frames, then the end without a trailer), `silence` (no answer), `state` and everything else: `answers`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.open = 0
        self.accepted = 0
        self.sent = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._server: asyncio.AbstractServer | None = None

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(5)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self.path.unlink(missing_ok=True)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path), backlog=1024, limit=1 << 20)
        self.path.chmod(0o666)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.accepted += 1
        try:
            while line := await reader.readline():
                asked = json.loads(line)
                self.requests.append(asked)
                body = await reader.readexactly(asked["body"]) if asked.get("body") else b""
                self.bodies.append(body)
                if not await self._answer(asked, body, reader, writer):
                    break
                await writer.drain()
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(
        self, asked: dict[str, Any], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        verb = asked["verb"]
        if verb == "echo":
            writer.write(b'{"ok":true}\n')
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            return False
        if verb in ("source", "framed", "cut"):
            writer.write(b'{"ok":true,"offset":0}\n')
            left = asked["n"]
            block = bytes(range(256)) * 256
            while left > 0:
                piece = block[: min(left, len(block))]
                if verb != "source":
                    writer.write(struct.pack(">I", len(piece)))
                writer.write(piece)
                left -= len(piece)
                self.sent += len(piece)
                await writer.drain()
            if verb == "framed":
                trailer = {"total": asked["n"], "exit": 0, "reason": None, "complete": True}
                writer.write(struct.pack(">I", 0) + json.dumps(trailer).encode() + b"\n")
            return False
        if verb == "silence":
            await asyncio.sleep(3600)
        answer = self.answers.get(verb, {"ok": True})
        if callable(answer):
            answer = answer(asked, body)
        if isinstance(answer, bytes):  # as it is, then the end
            writer.write(answer)
            return False
        writer.write(json.dumps(answer).encode() + b"\n")
        return bool(asked.get("keep", True))


@contextlib.contextmanager
def started(thing: Any) -> Iterator[Any]:
    thing.start()
    try:
        yield thing
    finally:
        thing.stop()


def link_user() -> str:
    """Who logs in: nobody when we may become anyone, else ourselves."""
    return "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
