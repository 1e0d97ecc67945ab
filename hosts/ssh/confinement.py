"""Trying what a link's key must not be able to do.

In charge of the attempts at one login; what is set up to be reached, and what follows, is `hosts.proofs`.
"""

from __future__ import annotations

import time

from paramiko.ssh_exception import SSHException

from hosts.ssh.errors import SocketRefused, SshError
from hosts.ssh.keys import Login
from hosts.ssh.threads import HostTransport, dial

TRY_SECONDS = 5.0
_MARK = "the-link-ran-a-command"


def liberties(login: Login, other_socket: str, tcp_port: int, remote_socket: str) -> tuple[list[str], list[str]]:
    """What the login could do besides reaching its socket: (what no host may allow, what a careful sshd would refuse).

    `other_socket` and `tcp_port` (on the host's loopback) must be listening, or a refusal would prove nothing;
    `remote_socket` is a path where a listener could be made. Raises SshError when there is no login at all.
    """
    wrong: list[str] = []
    lax: list[str] = []
    transport = dial(login)
    try:
        if _opens(transport, other_socket):
            wrong.append(f"it reaches another socket ({other_socket})")
        if _dials(transport, tcp_port):
            wrong.append("it reaches TCP ports of the host's loopback (permitopen)")
        if _runs(transport):
            wrong.append("it runs commands")
        if _listens(transport):
            wrong.append("it listens on TCP ports of the host (-R)")
        # authorized_keys has no word against this one; sshd_config has (AllowStreamLocalForwarding local).
        if transport.global_request("streamlocal-forward@openssh.com", (remote_socket,), wait=True) is not None:
            lax.append(
                "it may listen on Unix sockets of the host: set `AllowStreamLocalForwarding local` for it in sshd"
            )
    finally:
        transport.close()
    return wrong, lax


def _opens(transport: HostTransport, path: str) -> bool:
    try:
        transport.open_stream(path, time.monotonic() + TRY_SECONDS).close()
    except SocketRefused:
        return False
    return True


def _dials(transport: HostTransport, port: int) -> bool:
    try:
        transport.open_channel("direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 1), timeout=TRY_SECONDS).close()
    except SSHException:
        return False
    return True


def _runs(transport: HostTransport) -> bool:
    try:
        channel = transport.open_channel("session", timeout=TRY_SECONDS)
        with channel:
            channel.settimeout(TRY_SECONDS)
            channel.exec_command(f"echo {_MARK}")
            said = channel.recv(4096)
    except (SSHException, EOFError, OSError):
        return False
    return _MARK.encode() in said


def _listens(transport: HostTransport) -> bool:
    try:
        port = transport.request_port_forward("127.0.0.1", 0)
        transport.cancel_port_forward("127.0.0.1", port)
    except SSHException:
        return False
    return True


__all__ = ["SshError", "liberties"]
