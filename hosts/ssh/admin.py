"""The admin login: running a command on a host as root, with input, a deadline and its output line by line.

In charge of the exec channel and of becoming root. Which commands there are is `hosts.shipping` and `hosts.enrolment`.
Commands are argv lists; quoting happens here and nowhere else.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from paramiko.channel import Channel
from paramiko.ssh_exception import ChannelException, SSHException

from hosts.ssh.errors import ConnectionCut, LoginRefused, TimedOut, said
from hosts.ssh.keys import Login
from hosts.ssh.threads import DIAL_SECONDS, HostTransport, dial

OUTPUT_MAX: Final = 4 * 1024 * 1024
"""Bytes kept of a command's output; what comes after is read and dropped."""


class CommandFailed(Exception):
    """A command on the host ended with another status than 0."""

    def __init__(self, argv: Sequence[str], status: int, stdout: bytes, stderr: bytes) -> None:
        told = (stderr or stdout).decode(errors="replace").strip()[-800:]
        super().__init__(f"`{' '.join(argv)[:200]}` ended with {status}: {told}")
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


class Admin:
    """A logged-in admin: root itself, or a user who may become root by `sudo -n`. Use as a context manager."""

    def __init__(self, login: Login, timeout: float = DIAL_SECONDS) -> None:
        self.login = login
        self.transport: HostTransport = dial(login, timeout)
        self._prefix: tuple[str, ...] = ()
        try:
            if self.run_as_login(["id", "-u"], timeout=10).strip() != b"0":
                self._prefix = ("sudo", "-n", "--")
                try:
                    self.run(["true"], timeout=10)
                except CommandFailed as error:
                    raise LoginRefused(
                        f"{login.user} is not root and may not become root without a password (sudo -n): {error}"
                    ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Log out."""
        self.transport.close()

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        body: bytes | Iterable[bytes] = b"",
        on_line: Callable[[str], None] | None = None,
    ) -> bytes:
        """Run as root and return its stdout. `timeout` seconds for all of it; `on_line` gets stdout as it comes.

        `body` is its stdin; what it does not want of it, because it ended, is not sent.
        Raises CommandFailed, TimedOut or ConnectionCut. After either of the last two it may still run on the host.
        """
        return self._run([*self._prefix, *argv], timeout, body, on_line)

    def receive(self, argv: Sequence[str], *, timeout: float) -> Iterator[bytes]:
        """Run as root and give its stdout piece by piece, of whatever length. Its status is checked at the end.

        Raises CommandFailed, TimedOut or ConnectionCut: what was given until then is not the whole.
        """
        argv = [*self._prefix, *argv]
        deadline = time.monotonic() + timeout
        try:
            with self.transport.open_channel("session", timeout=min(timeout, DIAL_SECONDS)) as channel:
                channel.settimeout(0.5)
                channel.exec_command(shlex.join(argv))
                channel.shutdown_write()
                while True:
                    if time.monotonic() > deadline:
                        raise TimedOut(f"`{' '.join(argv)[:200]}` did not end within {timeout:.0f} s")
                    try:
                        data = channel.recv(1 << 20)
                    except TimeoutError:
                        continue
                    if not data:
                        break
                    yield data
                if not channel.status_event.wait(max(0.1, deadline - time.monotonic())):
                    raise TimedOut(f"`{' '.join(argv)[:200]}` did not end within {timeout:.0f} s")
                status = channel.exit_status
                told = channel.recv_stderr(65536) if channel.recv_stderr_ready() else b""
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionCut(f"while running `{argv[0]}`: {said(error)}") from error
        if status == -1:
            raise ConnectionCut(f"the connection was cut while running `{argv[0]}`")
        if status != 0:
            raise CommandFailed(argv, status, b"", told)

    def run_as_login(self, argv: Sequence[str], *, timeout: float) -> bytes:
        """As `run`, without becoming root."""
        return self._run(argv, timeout, b"", None)

    @contextlib.contextmanager
    def beside(self, argv: Sequence[str], *, timeout: float) -> Iterator[str]:
        """Run as root what prints one line when it is ready and ends with its input; gives that line.

        Raises TimedOut or ConnectionCut.
        """
        deadline = time.monotonic() + timeout
        line = b""
        try:
            channel = self.transport.open_channel("session", timeout=min(timeout, DIAL_SECONDS))
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionCut(f"while running `{argv[0]}`: {said(error)}") from error
        with channel:
            channel.settimeout(0.5)
            channel.exec_command(shlex.join([*self._prefix, *argv]))
            while not line.endswith(b"\n"):
                if time.monotonic() > deadline:
                    raise TimedOut(f"`{argv[0]}` was not ready within {timeout:.0f} s")
                try:
                    data = channel.recv(4096)
                except TimeoutError:
                    continue
                if not data:
                    told = channel.recv_stderr(4096).decode(errors="replace")[-500:]
                    raise ConnectionCut(f"`{argv[0]}` ended before it was ready: {told}")
                line += data
            yield line.decode(errors="replace").strip()
            channel.shutdown_write()

    def _run(
        self,
        argv: Sequence[str],
        timeout: float,
        body: bytes | Iterable[bytes],
        on_line: Callable[[str], None] | None,
    ) -> bytes:
        deadline = time.monotonic() + timeout
        try:
            channel: Channel = self.transport.open_channel("session", timeout=min(timeout, DIAL_SECONDS))
            channel.settimeout(0.5)
            channel.exec_command(shlex.join(argv))
            return self._talk(channel, argv, deadline, timeout, body, on_line)
        except ChannelException as error:
            raise LoginRefused(f"the host lets {self.login.user} run no commands: {error}") from error
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionCut(f"while running `{argv[0]}`: {said(error)}") from error

    def _talk(
        self,
        channel: Channel,
        argv: Sequence[str],
        deadline: float,
        timeout: float,
        body: bytes | Iterable[bytes],
        on_line: Callable[[str], None] | None,
    ) -> bytes:
        stdout, stderr, line = bytearray(), bytearray(), bytearray()
        pieces = iter([body] if isinstance(body, bytes) else body)
        held, all_sent = b"", False
        with channel:
            while True:
                if time.monotonic() > deadline:
                    raise TimedOut(f"`{' '.join(argv)[:200]}` did not end within {timeout:.0f} s")
                if not self.transport.active:
                    raise ConnectionCut(f"the connection was cut while running `{argv[0]}`")
                moved = False
                if not held and not all_sent:
                    held = next((piece for piece in pieces if piece), b"")
                    all_sent = not held
                    if all_sent:
                        channel.shutdown_write()
                if held and (channel.closed or channel.eof_received):
                    held, all_sent = b"", True  # it ended without wanting the rest
                elif held and channel.send_ready():
                    held = held[channel.send(held[:32768]) :]
                    moved = True
                while channel.recv_stderr_ready():
                    stderr += channel.recv_stderr(65536)
                    del stderr[:-OUTPUT_MAX]
                    moved = True
                if moved and not channel.recv_ready():
                    continue
                try:
                    data = channel.recv(65536) if all_sent or channel.recv_ready() else None
                except socket.timeout:  # noqa: UP041  (paramiko's own is an alias; named for what it is)
                    continue
                if data is None:
                    time.sleep(0.01)
                    continue
                if data == b"":
                    break
                if len(stdout) < OUTPUT_MAX:
                    stdout += data
                if on_line is not None:
                    line += data
                    while (at := line.find(b"\n")) >= 0:
                        on_line(line[:at].decode(errors="replace"))
                        del line[: at + 1]
            left = max(0.1, deadline - time.monotonic())
            if not channel.status_event.wait(left):
                raise TimedOut(f"`{' '.join(argv)[:200]}` did not end within {timeout:.0f} s")
            while channel.recv_stderr_ready():
                stderr += channel.recv_stderr(65536)
            status = channel.exit_status
        if on_line is not None and line:
            on_line(line.decode(errors="replace"))
        if status == -1 and not self.transport.active:
            raise ConnectionCut(f"the connection was cut while running `{argv[0]}`")
        if status != 0:
            raise CommandFailed(argv, status, bytes(stdout), bytes(stderr))
        return bytes(stdout)
