"""What may fail on the way to a host. In charge of the classes only; every text says what, and which limit was hit."""

from __future__ import annotations


class SshError(Exception):
    """Something failed on the way to a host."""


class DialFailed(SshError):
    """No TCP connection, no SSH banner, or no agreement on ciphers."""


class HostKeyChanged(SshError):
    """Who answered is not the host that was enrolled. Never retried with another key."""


class LoginRefused(SshError):
    """The host does not take our key for that user."""


class SocketRefused(SshError):
    """The host is there; nobody listens on the socket, its backlog is full, or this login may not open it."""


class ConnectionCut(SshError):
    """The connection or the channel ended before what was promised had arrived."""


class TimedOut(SshError):
    """The deadline passed."""


def said(error: BaseException | None) -> str:
    """An exception's own words, its name when it has none."""
    return str(error) or type(error).__name__
