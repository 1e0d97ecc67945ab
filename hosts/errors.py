"""What may go wrong when a host is asked, as the callers need to tell it apart.

In charge of the classes only: `HostUnreachable` (nobody knows whether it was done: retry, every verb is idempotent),
`HostRefused` (the host answered no) and its `StaleFence` (somebody newer is in charge: give up the row).
"""

from __future__ import annotations

from typing import Any


class HostError(Exception):
    """Anything that asking a host may raise."""

    host_id: str


class HostUnreachable(HostError):
    """No answer: not dialled (silent, circuit open, too many at once), refused, cut, or out of time.

    Whether the verb took effect is unknown. `reason` says which limit or which step it was.
    """

    def __init__(self, host_id: str, reason: str) -> None:
        super().__init__(f"host {host_id} is unreachable: {reason}")
        self.host_id = host_id
        self.reason = reason


class HostRefused(HostError):
    """The host answered with an error. `code` is one of `hostd.messages.ERROR_CODES`; `extra` its further fields."""

    def __init__(self, code: str, message: str, extra: dict[str, Any] | None = None, *, host_id: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.host_id = host_id
        self.code = code
        self.message = message
        self.extra = extra or {}


class StaleFence(HostRefused):
    """A newer request for this id was already served. `fence` is the highest the host knows."""

    def __init__(self, message: str, extra: dict[str, Any] | None = None, *, host_id: str = "") -> None:
        super().__init__("stale_fence", message, extra, host_id=host_id)
        fence = self.extra.get("fence")
        self.fence: int | None = fence if isinstance(fence, int) else None


def refused(host_id: str, code: str, message: str, extra: dict[str, Any]) -> HostRefused:
    """The exception for an error reply."""
    if code == "stale_fence":
        return StaleFence(message, extra, host_id=host_id)
    return HostRefused(code, message, extra, host_id=host_id)
